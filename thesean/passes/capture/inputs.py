"""The guide and its example inputs, checked before anything is traced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from thesean.errors import CaptureError, DataError


def check_guide(model: nn.Module) -> None:
    """Raises DataError unless all parameters are float32 and on one device."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module as guide, found {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the guide is a TorchScript module, which can't be traced. Give the module it was made from."
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise DataError(f"the guide is spread over {sorted(map(str, devices))}; expected one device.")
    if devices and next(iter(devices)).type == "meta":
        raise DataError("the guide's parameters are on the meta device and hold no values. Load its weights first.")


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


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
            raise DataError(f"the guide's forward takes no input {unknown[0]!r}; it takes: {', '.join(accepted)}.")
        # the order of forward(), so that positional calls mean the same thing afterwards
        order = [k for k in accepted if k in example] + [k for k in example if k not in accepted]
        named = {k: example[k] for k in order}
    else:
        if not isinstance(example, (tuple, list)):
            raise DataError(f"example inputs: expected a tensor, a tuple or a dict, found {type(example).__name__}.")
        if len(example) > len(names):
            raise DataError(f"the guide's forward takes {len(names)} inputs, the example has {len(example)}.")
        named = dict(zip(names, example, strict=False))
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise DataError(f"example input {name!r}: expected a tensor, found {type(value).__name__}.")
    if not named:
        raise DataError("the example inputs are empty.")
    device = next((p.device for p in model.parameters()), None)
    for name, value in named.items():
        if device is not None and value.device != device:
            raise DataError(f"input {name!r} is on {value.device}, the guide on {device}. Move one of them.")
    return named
