"""The module that stands in a graph where zeros stood in front of a sequence: in a stream the steps before it.

B batch, T new steps, P earlier ones
"""

from __future__ import annotations

import torch
from torch import nn


def seen_alone(x: torch.Tensor, mask_BT: torch.Tensor | None, dim: int, nothing: float = 0) -> torch.Tensor:
    """x_BT…, time along `dim`, with `nothing` at steps that the mask says are none."""
    if mask_BT is None:
        return x
    ones = (size if d in (0, dim) else 1 for d, size in enumerate(x.shape))
    return torch.where(mask_BT.reshape(*ones), x, nothing)


class LastSteps(nn.Module):
    """x_BT…, (before_BP…) -> whole_B(P+T)…, after_BP…: what came before and what comes, along `dim`, and the last
    `count` + `lookahead` steps of both. At the start that is zeros. A step that `mask_BT` says is none holds zeros.

    A whole sequence stands behind `count` zeros, and in front of `lookahead`: what reads it is as many steps late where
    it is a stream (`Streamed`).
    """

    stateful = True
    reads_mask = True

    def __init__(self, count: int, dim: int, lookahead: int = 0) -> None:
        super().__init__()
        self.count, self.dim, self.lookahead = count, dim, lookahead
        self.held = count + lookahead
        self.window = self.held + 1  # steps that are seen at once

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return self._zeros(x, self.held)

    def forward(
        self, x: torch.Tensor, before: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = seen_alone(x, mask, self.dim)
        parts = [self._zeros(x, self.count) if before is None else before, x]
        if before is None and self.lookahead:
            parts.append(self._zeros(x, self.lookahead))
        whole = torch.cat(parts, self.dim)
        return whole, torch.ops.aten.slice.Tensor(whole, self.dim, -self.held, 2**63 - 1)

    def _zeros(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        return x.new_zeros([steps if d == self.dim else size for d, size in enumerate(x.shape)])

    def extra_repr(self) -> str:
        told = {"count": self.count, "dim": self.dim, "lookahead": self.lookahead}
        return ", ".join(f"{name}={value}" for name, value in told.items() if value or name != "lookahead")
