"""The guide's share of a measure, computed once and compared with many students.

N examples, Q width of y
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from thesean.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a measure's value and loss take in place of y_NQ. `shape` is that of y_NQ."""

    shape: tuple[int, int]
    tensor: torch.Tensor
    options: Mapping[str, Any]


def preparer(make: Callable[..., torch.Tensor]) -> Callable[..., Prepared]:
    """`prepare` of a measure whose sides are `make(x_NP, **options)` each, compared afterwards."""
    defaults = {name: p.default for name, p in list(inspect.signature(make).parameters.items())[1:]}

    def prepare(y_NQ: torch.Tensor, **options: Any) -> Prepared:
        chosen = defaults | options
        return Prepared(shape=(y_NQ.shape[0], y_NQ.shape[1]), tensor=make(y_NQ.detach(), **chosen), options=chosen)

    return prepare


def side(y: torch.Tensor | Prepared, make: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    """`make(y, **options)`, or what was made before. Raises DataError when it was made with other options."""
    if isinstance(y, torch.Tensor):
        return make(y, **options)
    if y.options != options:
        raise DataError(f"the guide was prepared with {dict(y.options)}, and is used with {options}. Prepare it again.")
    return y.tensor
