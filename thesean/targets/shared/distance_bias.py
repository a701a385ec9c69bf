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
        wide = torch.promote_types(self.slope_H.dtype, torch.float32)  # whole numbers need its digits
        rest = (distance - last).clamp_min(0).to(wide)
        return self.table_HD[:, distance.clamp_max(last)] + self.slope_H.to(wide).view(-1, *(1,) * distance.ndim) * rest

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


def seen_from(bias: DistanceBias, ahead: int) -> Reach:
    """The bias of keys by how far they are behind the step that is `ahead` steps after the query."""
    if not ahead:
        return bias.behind
    after_HD = bias.ahead.of(torch.arange(ahead, 0, -1, device=bias.behind.table_HD.device))
    return Reach(torch.cat([after_HD.to(bias.behind.table_HD), bias.behind.table_HD], 1), bias.behind.slope_H)


class LearntReach(nn.Module):
    """`Reach` with a table to train, zeros until it is copied; the slopes stay as they are."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.table_HD = nn.Parameter(torch.zeros(heads, size))
        self.slope_H: torch.Tensor
        self.register_buffer("slope_H", torch.zeros(heads))

    @property
    def reach(self) -> Reach:
        return Reach(self.table_HD, self.slope_H)

    @torch.no_grad()
    def copy_from(self, reach: Reach) -> None:
        self.table_HD.copy_(reach.table_HD)
        self.slope_H.copy_(reach.slope_H)


class AddedBias(nn.Module):
    """`DistanceBias` with tables to train."""

    def __init__(self, heads: int, sizes: list[int]) -> None:
        super().__init__()
        self.behind, self.ahead = (LearntReach(heads, size) for size in sizes)

    @property
    def bias(self) -> DistanceBias:
        return DistanceBias(self.behind.reach, self.ahead.reach)

    def copy_from(self, bias: DistanceBias) -> None:
        self.behind.copy_from(bias.behind)
        self.ahead.copy_from(bias.ahead)
