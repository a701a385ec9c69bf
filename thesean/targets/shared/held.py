"""The guide's softmax over the last tokens and the older ones that score highest, and the one tensor that holds both.

B batch, T time, S = W + T, W tokens in the window, M older ones that are kept, N = M + W, H heads of queries, G heads
of keys and values, C width of queries and keys, K width of values, k = K + 1, X = C + 1 + k: a token's key, its score,
its value and a 1
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.core import Core
from thesean.targets.shared.steps import Steps, hide, last


class Held(nn.Module):
    """y_t = the mean of v_s by exp(scale q_t.k_s), s over the last W tokens, t's own included, and over the M that
    score highest of all before these, which fade as they come near to the least of them: see kernels/kept_attention.py.

    A row whose last value is 0 holds no token. Rows stand in the order in which they came, so that a step drops one of
    the first M + 1 and adds its own at the end.
    """

    operation = "held"  # what an export writes for it: deploy/lowering/forms/held.py

    def __init__(self, window: int, places: int, fade: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.window, self.places, self.fade, self.scale = window, places, fade, scale
        self.older, self.core = Core("kept_attention", fade=fade), Core("window_attention")

    def forward(
        self,
        query_BTHC: torch.Tensor,
        row_BTGX: torch.Tensor,
        held_BGNX: torch.Tensor,
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mean_BTHK and what is held after the last step."""
        width, query_BTHC = query_BTHC.shape[-1], self.scale * query_BTHC
        kept_BMGX, window_BWGX = held_BGNX.transpose(1, 2).split([self.places, self.window], 1)
        all_BSGX = torch.cat([window_BWGX, hide(row_BTGX, steps)], 1)
        left_BTGX = all_BSGX[:, : -self.window]
        sums_BTHk, top_BTH, kept_BMGX = self.older(
            query_BTHC, left_BTGX if steps is None else steps.hide_left(left_BTGX), kept_BMGX
        )
        key_BSGC, value_BSGk = all_BSGX[..., :width], all_BSGX[..., width + 1 :]
        mean_BTHK = self.core(query_BTHC, key_BSGC, value_BSGk, sums_BTHk, top_BTH)
        held_BNGX = torch.cat([kept_BMGX, last(all_BSGX, self.window, steps)], 1)
        return mean_BTHK, held_BNGX.transpose(1, 2)
