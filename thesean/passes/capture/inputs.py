"""The guide and its example inputs, checked before anything is traced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from thesean.errors import CaptureError, DataError
from thesean.passes.thread_state import STATE_IN, STATE_OUT

# Where a guess at a batch may be what went wrong
SAY_INPUTS = "Of batches, inputs=lambda batch: {...} says what is which."


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch's own wrappers run: the module that was compiled, or that is spread over devices."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_guide(model: nn.Module) -> None:
    """Raises CaptureError for what is no module that can be traced, DataError unless all parameters are floats that
    torch computes with, and on one device.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module as guide, found {type(model).__name__}.")
    for path, module in model.named_modules():
        whose = f"the guide's {path!r}" if path else "the guide"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{whose} is a TorchScript module, which can't be traced. Give the module it was made from."
            )
        if any(isinstance(v, torch.ScriptObject) for v in vars(module).values()):
            raise CaptureError(
                f"{whose} holds packed, quantised weights, which can't be traced or trained. Give the float module it "
                "was made from, and quantise what comes out."
            )
    integers = [n for n, p in model.named_parameters() if not (p.is_floating_point() or p.is_complex())]
    if integers:
        raise DataError(
            f"the guide's parameter {integers[0]!r} holds integers, quantised weights as it seems; expected "
            "floats. Load the model without quantisation."
        )
    small = [(n, p.dtype) for n, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize < 2]
    if small:
        raise DataError(
            f"the guide's parameter {small[0][0]!r} is {small[0][1]}, in which torch stores and does not compute; "
            "expected float16, bfloat16, float32 or float64. Load the model in one of those."
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise DataError(
            f"the guide is spread over {sorted(map(str, devices))}; expected one device. Load it without a device map "
            "or offloading, or call model.to(device)."
        )
    inferred = [name for name, p in model.named_parameters() if p.is_inference()]
    if inferred:
        raise DataError(
            f"the guide's parameter {inferred[0]!r} was made in torch.inference_mode, and can't be traced with "
            "gradients. Build or load the guide outside of it."
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    on_meta = [name for name, t in tensors if t.device.type == "meta"]
    if on_meta:
        raise DataError(
            f"the guide's {on_meta[0]!r} is on the meta device and holds no values. Load its weights first."
        )


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def own_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Of the module's own forward; none where it has no signature."""
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return {}


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """What forward takes. A wrapper that hands on *args and **kwargs takes what the module inside takes, that with most
    of the parameters, and keywords beside.
    """
    own = own_parameters(model)
    keywords = {n: p for n, p in own.items() if p.kind is inspect.Parameter.VAR_KEYWORD}
    inside = list(model.children())
    if len(own) != 2 or not keywords or any(p.kind not in _VARIADIC for p in own.values()) or not inside:
        return own
    most = max(inside, key=lambda m: sum(p.numel() for p in m.parameters()))
    found = forward_parameters(most)
    return {n: p for n, p in found.items() if p.kind not in _VARIADIC} | keywords if found else own


def named_inputs(model: nn.Module, example: Any) -> dict[str, torch.Tensor]:
    if example is None:
        raise DataError(
            "no example inputs: the guide has no dummy_inputs and no data was given. Pass example_inputs=(x,) or data=."
        )
    accepted = forward_parameters(model)
    names = [k for k, p in accepted.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        unknown = [k for k in example if k not in accepted and not open_ended]
        if unknown:
            raise DataError(
                f"the guide's forward takes no input {unknown[0]!r}; it takes: {', '.join(accepted)}. {SAY_INPUTS}"
            )
        # the order of forward(), so that positional calls mean the same thing afterwards
        order = [k for k in accepted if k in example] + [k for k in example if k not in accepted]
        named = {k: example[k] for k in order}
    else:
        if not isinstance(example, (tuple, list)):
            raise DataError(
                f"example inputs: expected a tensor, a tuple or a dict, found {type(example).__name__}. "
                "inputs=lambda batch: {...} gives them by name."
            )
        if len(example) > len(names):
            raise DataError(
                f"the guide's forward takes {len(names)} inputs by position, the example has {len(example)}. "
                f"It takes: {', '.join(str(p) for p in accepted.values()) or 'nothing'}. Give a dict by name, or wrap "
                "the guide in a module whose forward takes each tensor by a name of its own."
            )
        named = dict(zip(names, example, strict=False))
    given = {name: value for name, value in named.items() if value is not None}
    named = given or named
    for name, value in named.items():
        if isinstance(value, np.ndarray) or _is_of_whole_numbers(value):
            raise DataError(
                f"example input {name!r}: expected a tensor, found {type(value).__name__}. Make it one: "
                "torch.as_tensor, or a tokenizer with return_tensors='pt'."
            )
        if name.startswith((STATE_IN, STATE_OUT)):
            raise DataError(f"input {name!r}: an exported file's own states are called so. Rename it in forward.")
        if not isinstance(value, torch.Tensor):
            raise DataError(
                f"example input {name!r}: expected a tensor, found {type(value).__name__}. Wrap the guide in a module "
                "whose forward takes each tensor by a name of its own, and hands them on."
            )
    if not named:
        takes = ", ".join(str(p) for p in accepted.values()) or "nothing"
        raise DataError(f"the example inputs are empty: of what the guide's forward takes ({takes}) there is nothing.")
    device = next((p.device for p in model.parameters()), None)
    for name, value in named.items():
        if device is not None and value.device != device:
            raise DataError(f"input {name!r} is on {value.device}, the guide on {device}. Move one of them.")
        if not value.numel():
            raise DataError(f"input {name!r} is empty, of shape {tuple(value.shape)}: nothing can be traced with it.")
    return named


def _is_of_whole_numbers(value: Any) -> bool:
    """Whether it is what a tokenizer gives that isn't asked for tensors: lists of ids."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int)
