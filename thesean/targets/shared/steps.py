"""Which steps of a batch hold a token: what padding does to a module that reads time.

B batch, T time, W rows that a window holds, X whatever a step holds
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


class Steps:
    """A batch whose tokens were moved to the front of their rows, in order, what is hidden behind them.

    After that, padding on the left, on the right and in the middle is one case, and a row is what it would be alone: a
    causal module reads its tokens before it meets anything else, and has to see to its state only. `mask_BT` is True
    where there is a token; `seen_BT` says the same of the rows after the move, of which the first `count_B` are tokens.
    """

    def __init__(self, mask_BT: torch.Tensor) -> None:
        batch, time = mask_BT.shape
        self.mask_BT = mask_BT
        self.count_B = mask_BT.sum(1)
        step_1T = torch.arange(time, device=mask_BT.device).unsqueeze(0)
        self.seen_BT = step_1T < self.count_B.unsqueeze(1)
        before_BT = mask_BT.to(torch.int64).cumsum(1)  # tokens up to each step, its own included
        behind_BT = self.count_B.unsqueeze(1) + step_1T - before_BT
        self._place_BT = torch.where(mask_BT, before_BT - 1, behind_BT)
        self._order_BT = torch.zeros_like(before_BT).scatter(1, self._place_BT, step_1T.expand(batch, time))

    def to_front(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """Tokens first."""
        return take(x_BTX, self._order_BT)

    def back(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_front`, with zeros where nothing is seen."""
        return self.hide(take(x_BTX, self._place_BT), self.mask_BT)

    def hide(self, x_BTX: torch.Tensor, seen_BT: torch.Tensor | None = None, value: float = 0.0) -> torch.Tensor:
        """`value` in all rows that hold no token."""
        seen_BT = self.seen_BT if seen_BT is None else seen_BT
        return x_BTX.masked_fill(~seen_BT.view(*seen_BT.shape, *(1,) * (x_BTX.ndim - 2)), value)

    def flip(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """Each row's tokens in reverse order, still in front; its own inverse."""
        step_1T = torch.arange(x_BTX.shape[1], device=x_BTX.device).unsqueeze(0)
        return take(x_BTX, torch.where(self.seen_BT, self.count_B.unsqueeze(1) - 1 - step_1T, step_1T))

    def last(self, x_BSX: torch.Tensor, size: int) -> torch.Tensor:
        """The last `size` rows up to each row's last token, of S = size + T rows: `size` from before, then these."""
        row_1W = torch.arange(size, device=x_BSX.device).unsqueeze(0)
        return take(x_BSX, self.count_B.unsqueeze(1) + row_1W)

    def hide_left(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """Of what left a window as each step came: where no token came, nothing left."""
        return self.hide(x_BTX)

    def state(self, hidden_BTE: torch.Tensor, before_BE: torch.Tensor) -> torch.Tensor:
        """A hidden state after the last token; the one before where a row has none."""
        after_BSE = torch.cat([before_BE.unsqueeze(1).to(hidden_BTE.dtype), hidden_BTE], 1)
        return take(after_BSE, self.count_B.unsqueeze(1)).squeeze(1).to(before_BE.dtype)


def flip(x_BTX: torch.Tensor, steps: Steps | None) -> torch.Tensor:
    """Time reversed, in each row up to its last token."""
    return x_BTX.flip(1) if steps is None else steps.flip(x_BTX)


def hide(x_BTX: torch.Tensor, steps: Steps | None, value: float = 0.0) -> torch.Tensor:
    return x_BTX if steps is None else steps.hide(x_BTX, value=value)


def last(x_BSX: torch.Tensor, size: int, steps: Steps | None) -> torch.Tensor:
    """What a window of `size` rows holds after these, of S = size + T rows."""
    return x_BSX[:, -size:] if steps is None else steps.last(x_BSX, size)


def take(x_BTX: torch.Tensor, index_BN: torch.Tensor) -> torch.Tensor:
    """x[b, index[b, n]] -> (B, N, X), as one gather of whole rows."""
    batch, time = x_BTX.shape[:2]
    start_B1 = (torch.arange(batch, device=index_BN.device) * time).unsqueeze(1)
    rows_N = (start_B1 + index_BN).flatten()
    return F.embedding(rows_N, x_BTX.reshape(batch * time, -1)).view(*index_BN.shape, *x_BTX.shape[2:])
