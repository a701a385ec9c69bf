"""Rotary positions: pairs of a head's features turned by an angle that grows with the step (Su et al. 2021).

S steps, C width of a head, P pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn


class Rotation(NamedTuple):
    """At step s, features `first` and `second` of a head, one pair each, are turned by s times `angle` (radians)."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    angle: tuple[float, ...]

    def rows(self) -> list[list[float]]:
        """JSON values: (first, second, angle) of each pair."""
        return [[int(a), int(b), float(c)] for a, b, c in zip(*self, strict=True)]

    @staticmethod
    def of(rows: Sequence[Sequence[float]]) -> Rotation:
        first, second, angle = zip(*rows, strict=True)
        return Rotation(tuple(map(int, first)), tuple(map(int, second)), tuple(map(float, angle)))


# A step times the leading bits of an angle, in turns, is exact in float32 up to 2^12 steps, and near enough far past
# that: what remains of it after whole turns are taken off is an angle to 1e-6, where step times angle would be off by
# 5e-4 at 8192 steps.
_LEADING = 2.0**12


class Rotate(nn.Module):
    """x_BSHC -> x_BSHC with step s of each row turned by s angles. Of two turned vectors the product depends on their
    distance alone, so that counting may begin anywhere.
    """

    def __init__(self, rotation: Rotation, width: int) -> None:
        super().__init__()
        self.rotation = rotation
        partner, sign, turns = list(range(width)), [0.0] * width, [0.0] * width
        for first, second, angle in zip(*rotation, strict=True):
            partner[first], partner[second] = second, first
            sign[first], sign[second] = -1.0, 1.0
            turns[first] = turns[second] = angle / (2 * math.pi)
        leading = [round(t * _LEADING) / _LEADING for t in turns]
        self.partner_C: torch.Tensor
        self.sign_C: torch.Tensor
        self.leading_C: torch.Tensor
        self.rest_C: torch.Tensor
        # made anew from the configuration: nothing to save
        self.register_buffer("partner_C", torch.tensor(partner), persistent=False)
        self.register_buffer("sign_C", torch.tensor(sign), persistent=False)
        self.register_buffer("leading_C", torch.tensor(leading), persistent=False)
        rest = [t - l for t, l in zip(turns, leading, strict=True)]
        self.register_buffer("rest_C", torch.tensor(rest), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Rotate:
        """Moved where the network goes, and never rounded to its precision: steps times angles need their digits."""
        super()._apply(lambda t: fn(t) if t.is_meta else t.to(fn(t).device), recurse)
        return self

    def tables(self, steps: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos_S1C and sin_S1C, the latter with the sign of the pair's member; in float32 at least."""
        return self.tables_at(torch.arange(steps, device=like.device), like)

    def tables_at(self, step: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the steps told, (...) whole numbers: (..., 1, C)."""
        wide = torch.promote_types(like.dtype, torch.float32)
        step = step.to(wide).unsqueeze(-1)
        turns = step * self.leading_C.to(wide)
        angle = 2 * math.pi * (turns - turns.floor() + step * self.rest_C.to(wide))
        return angle.cos().unsqueeze(-2), (self.sign_C.to(wide) * angle.sin()).unsqueeze(-2)

    def turn(self, x_BSHC: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], start: int = 0) -> torch.Tensor:
        """`start`: the row of the tables that the first step is at."""
        return self.turn_by(x_BSHC, *(t[start : start + x_BSHC.shape[1]] for t in tables))

    def turn_by(self, x_BSHC: torch.Tensor, cos_S1C: torch.Tensor, sin_S1C: torch.Tensor) -> torch.Tensor:
        """By rows of the tables: one for each step, or one for all of them."""
        turned = x_BSHC * cos_S1C + x_BSHC.index_select(-1, self.partner_C) * sin_S1C
        return turned.to(x_BSHC.dtype)

    def forward(self, x_BSHC: torch.Tensor) -> torch.Tensor:
        # a row for each step already: cut to its length, they couldn't be counted by row of the batch
        return self.turn_by(x_BSHC, *self.tables(x_BSHC.shape[1], x_BSHC))
