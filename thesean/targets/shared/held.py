"""The guide's softmax over the last tokens and the older ones that score highest, and what holds both.

B batch, T time, S = W + T, W tokens in the window, M older ones that are kept, N = M + W, H heads of queries, G heads
of keys and values, C width of queries and keys, K width of values, k = K + 1, X = C + 1 + k: a token's key, its score,
its value and a 1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from thesean.targets.shared.core import Core
from thesean.targets.shared.steps import Steps, hide, last


class HeldTokens(NamedTuple):
    """N places for tokens. `marks_BG2N` says of each its time and its score. The time is 0 where it holds no token, 1
    for one that is kept, and in the window 2 for the oldest to W + 1 for the last: what goes by with each step. Zeros
    hold nothing.

    A module leaves them in the order in which they came. In a file, where a step writes one place and moves none, they
    stand in any: see deploy/lowering/held_function/.
    """

    key_BGNC: torch.Tensor
    value_BGNK: torch.Tensor
    marks_BG2N: torch.Tensor


class Held(nn.Module):
    """y_t = the mean of v_s by exp(scale q_t.k_s), s over the last W tokens, t's own included, and over the M that
    score highest of all before these, which fade as they come near to the least of them: see kernels/kept_attention.py.
    """

    operation = "held"  # what an export writes for it: deploy/lowering/forms/held.py

    def __init__(self, window: int, places: int, fade: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.window, self.places, self.fade, self.scale = window, places, fade, scale
        self.older, self.core = Core("kept_attention", fade=fade), Core("window_attention")

    def forward(
        self,
        query_BTHC: torch.Tensor,
        key_BTGC: torch.Tensor,
        value_BTGK: torch.Tensor,
        score_BTG: torch.Tensor,
        held: HeldTokens,
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, HeldTokens]:
        """mean_BTHK and what is held after the last step."""
        width, query_BTHC = query_BTHC.shape[-1], self.scale * query_BTHC
        kept_BMGX, window_BWGX = _rows(held).transpose(1, 2).split([self.places, self.window], 1)
        one_BTG1 = torch.ones_like(value_BTGK[..., :1])
        row_BTGX = torch.cat([key_BTGC, score_BTG.unsqueeze(-1), value_BTGK, one_BTG1], -1)
        all_BSGX = torch.cat([window_BWGX, hide(row_BTGX, steps)], 1)
        left_BTGX = all_BSGX[:, : -self.window]
        sums_BTHk, top_BTH, kept_BMGX = self.older(
            query_BTHC, left_BTGX if steps is None else steps.hide_left(left_BTGX), kept_BMGX
        )
        key_BSGC, value_BSGk = all_BSGX[..., :width], all_BSGX[..., width + 1 :]
        mean_BTHK = self.core(query_BTHC, key_BSGC, value_BSGk, sums_BTHk, top_BTH)
        held_BNGX = torch.cat([kept_BMGX, last(all_BSGX, self.window, steps)], 1)
        return mean_BTHK, self._held(held_BNGX.transpose(1, 2), held)

    def _held(self, row_BGNX: torch.Tensor, before: HeldTokens) -> HeldTokens:
        width = before.key_BGNC.shape[-1]
        place_N = torch.arange(row_BGNX.shape[2], device=row_BGNX.device)
        time_N = (place_N - self.places + 2).clamp(min=1).to(row_BGNX.dtype)
        marks_BG2N = torch.stack([time_N * row_BGNX[..., -1], row_BGNX[..., width]], 2)
        after = row_BGNX[..., :width], row_BGNX[..., width + 1 : -1], marks_BG2N
        return HeldTokens(*(now.to(then.dtype) for now, then in zip(after, before, strict=True)))


def _rows(held: HeldTokens) -> torch.Tensor:
    """Tokens that stand in their order as rows, (B, G, N, X)."""
    time_BGN1, score_BGN1 = held.marks_BG2N.unsqueeze(-1).unbind(2)
    return torch.cat([held.key_BGNC, score_BGN1, held.value_BGNK, time_BGN1.clamp(max=1)], -1)
