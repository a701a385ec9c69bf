"""`len(x)` of a tensor is its first size while a guide is traced: a plain number would fix it at the example's."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn


def files_of(model: nn.Module) -> list[ModuleType]:
    """Those that the classes of a model's modules stand in, but torch's own."""
    classes = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
    names = dict.fromkeys(kind.__module__ for kind in classes if not kind.__module__.startswith("torch."))
    return [sys.modules[name] for name in names if name in sys.modules]


@contextmanager
def lengths_as_sizes(model: nn.Module) -> Iterator[None]:
    """Inside, the code of `model` finds such a `len` before Python's own."""
    places = [place for place in files_of(model) if place is not builtins and "len" not in vars(place)]
    for place in places:
        vars(place)["len"] = _length
    try:
        yield
    finally:
        for place in places:
            del vars(place)["len"]


def _length(x: Any) -> Any:
    return x.shape[0] if isinstance(x, torch.Tensor) and x.ndim else len(x)
