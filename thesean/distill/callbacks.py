"""The caller's own functions: what they raise or return is told in terms of the argument that they were given as."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thesean.distill.task import Loss, Metric
from thesean.errors import DataError, TheseanError
from thesean.passes.capture.explain import short, where_of
from thesean.passes.graph.modes import callers_settings


@contextmanager
def telling(what: str, advice: Callable[[], str] = str) -> Iterator[None]:
    """What the caller's code raises becomes a DataError that names it and the line, and gives what `advice` there is
    then.
    """
    try:
        with callers_settings():
            yield
    except (TheseanError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(f"{what} raised {short(error)}{where_of(error)}.{advice()}") from error


def _of_pairs(function: Any, named: str, output: Any, batch: Any) -> str:
    """What to say of torch's own functions, which take a prediction and a target."""
    if not (isinstance(function, torch.nn.Module) or str(getattr(function, "__module__", "")).startswith("torch")):
        return ""
    kinds = " and ".join(type(value).__name__ for value in (output, batch))
    return (
        f" It is given all of the output and the whole batch, here {kinds}: pick what it compares, as in "
        f"{named}=lambda output, batch: f(output, batch[1]), or take thesean.cross_entropy."
    )


@contextmanager
def unwritten(what: str, output: Any) -> Iterator[None]:
    """Raises DataError where the caller's function writes into the output: other figures are made of it too."""
    tensors = [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor) and not v.is_inference()]
    before = [v._version for v in tensors]
    yield
    if before != [v._version for v in tensors]:
        raise DataError(
            f"{what} changes output in place, and guide and converted network are compared by it. Let it make a tensor "
            "of its own: output * 2 in place of output.mul_(2), or output.clone() first."
        )


def checked_loss(loss: Loss | None) -> Loss | None:
    """Raises DataError for what no loss can be. A plain number will do where nothing is trained on it."""
    if loss is None:
        return None

    @wraps(loss)
    def checked(output: Any, batch: Any) -> Any:
        advice = partial(_of_pairs, loss, "loss", output, batch)
        with telling("loss(output, batch)", advice), unwritten("loss(output, batch)", output):
            value = loss(output, batch)
        if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.is_complex()):
            kind = "complex numbers" if value.is_complex() else f"a tensor of shape {tuple(value.shape)}"
            raise DataError(f"loss(output, batch) returned {kind}; expected a real scalar, such as a mean.")
        if not isinstance(value, (torch.Tensor, numbers.Real)):
            own = " No guide is given labels: compute it from both, as thesean.cross_entropy does."
            told = f"loss(output, batch) returned {type(value).__name__}; expected a scalar tensor."
            raise DataError(told + own * (value is None))
        return value

    return checked


def checked_metric(metric: Metric | None) -> Metric | None:
    """Raises DataError for what is no number."""
    if metric is None:
        return None

    @wraps(metric)
    def checked(output: Any, batch: Any) -> float:
        advice = partial(_of_pairs, metric, "metric", output, batch)
        with telling("metric(output, batch)", advice), unwritten("metric(output, batch)", output):
            value = metric(output, batch)
        is_scalar = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
        if not is_scalar and not isinstance(value, numbers.Real):
            found = repr(value)[:40]
            if isinstance(value, torch.Tensor):
                found = "complex numbers" if value.is_complex() else f"a tensor of shape {tuple(value.shape)}"
            raise DataError(f"metric(output, batch) returned {found}; expected a number, such as a mean.")
        with telling("metric(output, batch)"):  # a whole number may be none that a float holds
            return float(value)

    return checked


def checked_reader(name: str, read: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """`inputs=` or `labels=`."""
    if read is None:
        return None

    @wraps(read)
    def checked(batch: Any) -> Any:
        with telling(f"{name}(batch), given {_described(batch)},"):
            return read(batch)

    return checked


def _described(batch: Any) -> str:
    """A batch in a few words: its keys, its entries, its shape."""
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of {', '.join(map(repr, batch)) or 'nothing'}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(v).__name__ for v in batch[:8])})"
    return f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, torch.Tensor) else type(batch).__name__


def length_of(data: Any) -> int | None:
    """How many items the caller's iterable has, where it tells: a DataLoader of what only streams has a len(), which
    raises.
    """
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def each_of(data: Any, name: str) -> Iterator[Any]:
    """The items of the caller's iterable."""
    with telling(name):
        items = iter(data)
    number = 0
    while True:
        with telling(f"{name}, batch {number}:"):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
        number += 1
