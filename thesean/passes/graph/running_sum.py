"""The module that stands in a graph for a sum over all steps so far.

B batch, T time
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.passes.graph.last_steps import seen_alone


class RunningSum(nn.Module):
    """x_BT…, (before_B…) -> sums_BT…, after_B…: along `dim`; a step that `mask_BT` says is none adds nothing."""

    stateful = True
    reads_mask = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(
        self, x: torch.Tensor, before: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = seen_alone(x, mask, self.dim).cumsum(self.dim)
        if before is not None:
            sums = sums + before.unsqueeze(self.dim)
        return sums, sums.select(self.dim, -1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
