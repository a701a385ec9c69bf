"""The module that stands in a graph for a product, a sum of exponentials, a largest or least value of all steps so far.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from thesean.kernels.running_fold import NOTHING, Fold
from thesean.passes.graph.last_steps import seen_alone
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.running import places_read
from thesean.targets.shared.core import Core

aten = torch.ops.aten

FOLDS: Mapping[Any, Fold] = {
    aten.cumprod.default: "product",
    aten.logcumsumexp.default: "logsumexp",
    aten.cummax.default: "largest",
    aten.cummin.default: "least",
}


class RunningFold(nn.Module):
    """x_BT…, (before_B…2) -> folds_BT…, after_B…2: along `dim`; a step that `mask_BT` says is none changes nothing.

    The state is the last fold and whether there is one: at the start, where all of it is zeros, there is none.
    """

    stateful = True
    reads_mask = True

    def __init__(self, dim: int, fold: Fold) -> None:
        super().__init__()
        self.dim = dim
        self.nothing = NOTHING[fold]
        self.core = Core("running_fold", fold=fold)

    def forward(
        self, x: torch.Tensor, before: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_BT = seen_alone(x.movedim(self.dim, 1), mask, 1, self.nothing)
        ones_B = torch.ones_like(x_BT[:, 0])
        begun_B = ones_B if mask is None else ones_B * mask.any(1).view(-1, *(1 for _ in x_BT.shape[2:]))
        start_B = ones_B * self.nothing
        if before is not None:
            start_B = torch.where(before[..., 1] > 0, before[..., 0], start_B)
            begun_B = torch.maximum(begun_B, before[..., 1])
        folds_BT, last_B = self.core(x_BT, start_B)
        after_B2 = torch.stack([torch.where(begun_B > 0, last_B.to(x.dtype), 0), begun_B], -1)
        return folds_BT.movedim(1, self.dim), after_B2

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def fold_of(node: fx.Node) -> Fold | None:
    """Of floats along a dimension that isn't the first, where nothing reads the places of largest and least values."""
    fold = FOLDS.get(node.target)
    if fold is None:
        return None
    x = argument(node, 0, "self")
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2:
        return None
    if places_read(node):
        return None
    return fold if argument(node, 1, "dim") % value.ndim else None
