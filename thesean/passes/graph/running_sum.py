"""The module that stands in a graph for a sum over all steps so far.

B batch, T time
"""

from __future__ import annotations

import torch
from torch import nn


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
        if mask is not None:
            ones = (1 if d not in (0, self.dim) else size for d, size in enumerate(x.shape))
            x = torch.where(mask.reshape(*ones), x, 0)
        sums = x.cumsum(self.dim)
        if before is not None:
            sums = sums + before.unsqueeze(self.dim)
        return sums, sums.select(self.dim, -1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
