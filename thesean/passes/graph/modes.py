"""Another mode for a while, and then all as it was: eval flags and buffers, the random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[KeptBuffers]:
    """Eval mode inside; afterwards every module's own flag, and buffers as they were where a forward writes to them.

    Gives those buffers, so that whoever runs the model can see what it changed.
    """
    flags = [(m, m.training) for m in model.modules()]
    buffers = KeptBuffers(model)
    model.eval()
    try:
        yield buffers
    finally:
        for module, flag in flags:
            module.training = flag
        buffers.restore()


@contextmanager
def configured(model: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """These settings inside, in the `config` of every module that has one with such a setting; theirs afterwards.

    A wrapper's forward doesn't pass on what an inner model takes as an argument; its config reaches it all the same.
    """
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    before = [(c, k, getattr(c, k)) for c in configs.values() for k in values if k in getattr(c, "__dict__", {})]
    for config, name, _ in before:
        setattr(config, name, values[name])
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


class KeptBuffers:
    """A module's buffers as they were: the tensors that it held, by name, and their values."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (f"{path}.{name}" if path else name, module, name, buffer, buffer.detach().clone())
            for path, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def changed(self) -> list[str]:
        """Paths of the buffers that hold other values now, written in place or assigned anew."""
        return [path for path, module, name, _, value in self._kept if not _same(getattr(module, name, None), value)]

    @torch.no_grad()
    def restore(self) -> None:
        for _, module, name, buffer, value in self._kept:
            if not _same(buffer, value):
                buffer.copy_(value)
            if buffer.grad_fn is not None and not buffer._is_view():
                buffer.detach_()  # what was written into it had a gradient
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)


def _same(found: object, value: torch.Tensor) -> bool:
    """Whether this is a tensor of the same values, NaN equal to NaN."""
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (value.shape, value.dtype):
        return False
    return torch.equal(found, value) or (
        value.is_floating_point()
        and torch.equal(found.isnan(), value.isnan())
        and torch.equal(found.nan_to_num(), value.nan_to_num())
    )


# of whoever called Thesean, while torch's default dtype is the usual one
_callers_dtype: ContextVar[torch.dtype | None] = ContextVar("thesean_callers_dtype", default=None)


@contextmanager
def usual_settings() -> Iterator[None]:
    """torch makes tensors as in a fresh process inside: in float32, on the CPU, such that they can be trained, and
    computes in the precision of what it is given. What is drawn at random is no loss to the caller.
    """
    before = torch.get_default_dtype()
    token = _callers_dtype.set(before)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            _set_default_dtype(torch.float32)
            yield
    finally:
        _set_default_dtype(before)
        _callers_dtype.reset(token)


@contextmanager
def callers_settings() -> Iterator[None]:
    """The caller's default dtype inside, for code that is the caller's."""
    before, theirs = torch.get_default_dtype(), _callers_dtype.get()
    try:
        if theirs is not None:
            _set_default_dtype(theirs)
        yield
    finally:
        _set_default_dtype(before)


def _set_default_dtype(dtype: torch.dtype) -> None:
    if torch.get_default_dtype() != dtype:  # it is the whole process's: untouched where it can be
        torch.set_default_dtype(dtype)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from this seed inside; afterwards the caller's go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
