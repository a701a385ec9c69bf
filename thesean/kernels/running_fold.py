"""What all steps so far come to: products, sums of exponentials, largest and least values.

B batch, T time
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from thesean.kernels.shared.precision import wide

Fold = Literal["product", "logsumexp", "largest", "least"]

# Of no steps at all.
NOTHING: Mapping[Fold, float] = {"product": 1.0, "logsumexp": -math.inf, "largest": -math.inf, "least": math.inf}


def log_of_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log(exp(a) + exp(b)), of operators that overflow nowhere."""
    apart = torch.where(a == b, torch.zeros_like(a), a - b).abs()  # of two infinities none
    return torch.maximum(a, b) + torch.log1p(torch.exp(-apart))


_RUNNING: Mapping[Fold, Callable[[torch.Tensor], torch.Tensor]] = {
    "product": lambda x: x.cumprod(1),
    "logsumexp": lambda x: x.logcumsumexp(1),
    "largest": lambda x: x.cummax(1).values,
    "least": lambda x: x.cummin(1).values,
}
JOINED: Mapping[Fold, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "product": torch.mul,
    "logsumexp": log_of_sum,
    "largest": torch.maximum,
    "least": torch.minimum,
}


def running_fold(x_BT: torch.Tensor, before_B: torch.Tensor, *, fold: Fold) -> tuple[torch.Tensor, torch.Tensor]:
    """The fold of `before` and all steps up to each, and the last of them.

    x_BT…, before_B… (NOTHING[fold] where there is nothing before) -> folds_BT…, last_B…. T steps at once equal T single
    steps. Half-precision inputs are computed in float32: `folds` has the input's dtype, `last` stays wide.
    Differentiable. Raises ValueError for shapes that do not fit or T = 0.
    """
    if x_BT.ndim < 2 or before_B.shape != x_BT.shape[:1] + x_BT.shape[2:] or x_BT.shape[1] == 0:
        raise ValueError(
            f"running_fold: expected x (B, T, ...) with T >= 1 and before (B, ...), found x {tuple(x_BT.shape)}, "
            f"before {tuple(before_B.shape)}."
        )
    folds_BT = JOINED[fold](_RUNNING[fold](wide(x_BT)), wide(before_B).unsqueeze(1))
    return folds_BT.to(x_BT.dtype), folds_BT[:, -1]
