"""The values of the steps around, side by side, as features of a solved layer: what stands how far away counts for
itself, where a recurrence adds up all that there was.

B batch, T time, V what a step holds, P places, S = P - 1 + T
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from thesean.targets.shared.steps import Steps, last


@dataclass(frozen=True, kw_only=True)
class Taps:
    """value_BTV, past_B(P-1)V -> (side by side_BT(P V), past_B(P-1)V), the latest first; zeros where no step is.

    Of the last `count` steps, its own included; asked `ahead` steps late, of those since as well; both ways of the
    `count` - 1 steps after it too, without a past.
    """

    count: int
    both_ways: bool = False
    ahead: int = 0

    @property
    def places(self) -> int:
        return 2 * self.count - 1 if self.both_ways else self.count + self.ahead

    @property
    def carries(self) -> int:
        """Steps of its state."""
        return 0 if self.both_ways else self.places - 1

    def initial_state(self, x_BTD: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
        return (x_BTD.new_zeros(x_BTD.shape[0], self.carries, width),) if self.carries else ()

    def __call__(
        self, value_BTV: torch.Tensor, past: tuple[torch.Tensor, ...], steps: Steps | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """`past` is a state of `initial_state`'s shapes; hidden steps of the value hold zeros."""
        time, before = value_BTV.shape[1], self.places - 1
        if self.both_ways:
            all_BSV = F.pad(value_BTV, (0, 0, self.count - 1, self.count - 1))
        elif past:
            all_BSV = torch.cat([past[0].to(value_BTV.dtype), value_BTV], 1)
        else:
            return value_BTV, ()
        taps = [all_BSV[:, at : at + time] for at in range(before, -1, -1)]
        after = (last(all_BSV, before, steps),) if self.carries else ()
        return torch.cat(taps, -1), after
