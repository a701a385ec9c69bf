"""What a module that reads time has to know to read some steps ahead.

A module with a look-ahead of k is a causal one whose outputs come k steps late: what it holds after step t + k, or
after each step from t to there, is read with what step t itself asks for, so that an output knows its own step and k
later ones. A whole sequence is such a stream, run k steps past its end in which nothing comes, without the first k
outputs.

B batch, T time, S = W + T, W rows that a window holds, k steps ahead, J = k + 1 taps, X whatever a step holds, E width
of a state
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from thesean.kernels.shared.precision import widen
from thesean.targets.shared.steps import Steps, take


class Late:
    """What steps gave k steps before, zeros before the first: z_BTX -> z_BTX.

    Each call takes its own columns of `past_BkX`, in the order of the calls; `state` is what the next chunk is given.
    """

    def __init__(self, past_BkX: torch.Tensor) -> None:
        self._past_BkX, self._used = past_BkX, 0
        self._after: list[torch.Tensor] = []

    def __call__(self, z_BTX: torch.Tensor) -> torch.Tensor:
        return self.since(z_BTX)[:, : -self._past_BkX.shape[1]]

    def since(self, z_BTX: torch.Tensor) -> torch.Tensor:
        """The k steps before too, (B, k + T, X)."""
        first, self._used = self._used, self._used + z_BTX.shape[-1]
        all_BSX = torch.cat([self._past_BkX[:, :, first : self._used].to(z_BTX.dtype), z_BTX], 1)
        self._after.append(all_BSX[:, -self._past_BkX.shape[1] :])
        return all_BSX

    @property
    def state(self) -> torch.Tensor:
        return torch.cat(self._after, -1)


class LaterSteps(nn.Module):
    """y_t = sum_j w_j h_{t+j}, j from 0 to k, per channel: a look-ahead convolution (Wang et al. 2016, section 3).

    h_BTE -> y_BTE, k steps late. At first each channel is that of one step, every other one of step t itself, the rest
    of the later ones in turns, so that what is solved on top tells the steps apart. A recurrence that was only asked at
    t + k had forgotten much of step t: `mingru` on benchmarks/lookahead.py's guide after 100 steps, one seed, 1.47 nats
    with 4 steps ahead and 1.35 with none; in this way 1.05.
    """

    def __init__(self, width: int, ahead: int) -> None:
        super().__init__()
        channel_E = torch.arange(width)
        step_E = torch.where(channel_E % 2 == 0, 0, channel_E // 2 % ahead + 1)
        self.taps_EJ = nn.Parameter(F.one_hot(step_E, ahead + 1).to(torch.get_default_dtype()))

    def forward(self, h_BTE: torch.Tensor, late: Late) -> torch.Tensor:
        # wide: torch 2.13 doesn't come back from a depthwise convolution of 16 taps or more in float16 on a CPU
        h_BSE, taps_EJ = widen(late.since(h_BTE), self.taps_EJ)
        y_BET: torch.Tensor = F.conv1d(h_BSE.mT, taps_EJ.unsqueeze(1), groups=len(taps_EJ))
        return y_BET.mT.to(h_BTE.dtype)


def read_later(later: LaterSteps | None, h_BTE: torch.Tensor, late: Late | None) -> torch.Tensor:
    """As it is, without a look-ahead."""
    return h_BTE if later is None or late is None else later(h_BTE, late)


class InPlace(Steps):
    """Steps of which some hold no token, left where they are: hidden ones may stand before a row's first token and
    after its last one, not between.

    An output that is read late stands at a step of its own, hidden or not: windows slide at each step, and a state
    stays as it was where none comes. `ended`: how many steps at the end are hidden in all rows, and no others.
    """

    def __init__(self, mask_BT: torch.Tensor, ended: int = 0) -> None:
        super().__init__(mask_BT)
        self.seen_BT = mask_BT
        self.ended = ended

    def last(self, x_BSX: torch.Tensor, size: int) -> torch.Tensor:
        return x_BSX[:, -size:]

    def hide_left(self, x_BTX: torch.Tensor) -> torch.Tensor:
        return x_BTX

    def over_tokens(
        self,
        run: Callable[[torch.Tensor, Steps | None], tuple[torch.Tensor, Any]],
        x_BTX: torch.Tensor,
        before_BE: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:
        """(hidden_BTE after the tokens up to each step, what `run` gives beside), for a recurrence that takes no step
        in place: `run` is given tokens first. `before_BE` is what is held where none came yet.
        """
        if self.ended:
            hidden_BTE, after = run(x_BTX[:, : -self.ended], None)
            held_BTE = hidden_BTE[:, -1:].expand(-1, self.ended, -1)
            return torch.cat([hidden_BTE, held_BTE], 1), after
        hidden_BTE, after = run(self.to_front(x_BTX), self)
        hidden_BSE = torch.cat([before_BE.unsqueeze(1).to(hidden_BTE.dtype), hidden_BTE], 1)
        return take(hidden_BSE, self.mask_BT.to(torch.int64).cumsum(1)), after


def ended(x_BSX: torch.Tensor, ahead: int) -> InPlace:
    """Steps of which the last `ahead` are hidden."""
    step_1S = torch.arange(x_BSX.shape[1], device=x_BSX.device).unsqueeze(0)
    return InPlace((step_1S < x_BSX.shape[1] - ahead).expand(x_BSX.shape[0], -1), ahead)
