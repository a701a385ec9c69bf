"""What is added to the scores by the distance of query and key alone: ALiBi (Press et al. 2022), a table over relative
positions (Raffel et al. 2020), a sliding window.

H heads, D distances of a table, T time
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

# What hides a key: no score makes up for it, and its exponential is 0. Finite, so that it can be trained beside others.
HIDDEN = -1e4


class Reach(NamedTuple):
    """One direction: column d of the table is that of d steps away, and past its end it goes on by the slope."""

    table_HD: torch.Tensor
    slope_H: torch.Tensor

    def of(self, distance: torch.Tensor) -> torch.Tensor:
        """(...) whole numbers of 0 or more -> (H, ...)."""
        last = self.table_HD.shape[1] - 1
        rest = (distance - last).clamp_min(0).to(self.slope_H.dtype)
        return self.table_HD[:, distance.clamp_max(last)] + self.slope_H.view(-1, *(1,) * distance.ndim) * rest

    def heads(self, kept_H: torch.Tensor) -> Reach:
        return Reach(self.table_HD[kept_H], self.slope_H[kept_H])


class DistanceBias(NamedTuple):
    """`behind` for keys at a query's own step and before it, `ahead` for those after it; both begin at distance 0."""

    behind: Reach
    ahead: Reach

    @property
    def sizes(self) -> list[int]:
        """Distances of both tables."""
        return [reach.table_HD.shape[1] for reach in self]

    def matrix(self, time: int, like: torch.Tensor) -> torch.Tensor:
        """(H, T, T) for queries by keys, on `like`'s device and in its dtype; distances need float32."""
        step_T = torch.arange(time, device=like.device)
        distance_TT = step_T.unsqueeze(1) - step_T
        wide = torch.promote_types(like.dtype, torch.float32)
        behind, ahead = (Reach(*(t.to(like.device, wide) for t in reach)) for reach in self)
        bias_HTT = torch.where(
            distance_TT >= 0, behind.of(distance_TT.clamp_min(0)), ahead.of((-distance_TT).clamp_min(0))
        )
        return bias_HTT.to(like.dtype)

    def heads(self, kept_H: torch.Tensor) -> DistanceBias:
        return DistanceBias(*(reach.heads(kept_H) for reach in self))

    def is_nothing(self) -> bool:
        return not any(bool(t.any()) for reach in self for t in reach)


class AddedBias(nn.Module):
    """`DistanceBias` with tables to train, zeros until it is copied; slopes stay as they are."""

    def __init__(self, heads: int, sizes: list[int]) -> None:
        super().__init__()
        behind, ahead = sizes
        self.behind_HD = nn.Parameter(torch.zeros(heads, behind))
        self.ahead_HD = nn.Parameter(torch.zeros(heads, ahead))
        self.slope_2H: torch.Tensor
        self.register_buffer("slope_2H", torch.zeros(2, heads))

    @property
    def bias(self) -> DistanceBias:
        return DistanceBias(Reach(self.behind_HD, self.slope_2H[0]), Reach(self.ahead_HD, self.slope_2H[1]))

    @torch.no_grad()
    def copy_from(self, bias: DistanceBias) -> None:
        for own, reach, table_HD in zip(self.slope_2H, bias, (self.behind_HD, self.ahead_HD), strict=True):
            table_HD.copy_(reach.table_HD)
            own.copy_(reach.slope_H)
