"""What a linear attention adds to keep the guide's softmax over the last W tokens.

B batch, T time, S = W + T, H heads of queries, G heads of keys and values, C width of queries and keys, k = K + 1
columns of the values, the last of ones, M queries that are looked at
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.core import Core
from thesean.targets.shared.rotation import Rotate
from thesean.targets.shared.steps import Steps, last

# Queries of one sequence that the balance is chosen on, spread evenly: all would take memory quadratic in time.
_QUERIES = 128

# Where the two shares are made equal. e^24 is far beyond what any score of a trained attention makes up for.
_LARGEST_GATE = 24.0
_HALVINGS = 40


class Window(nn.Module):
    """y_t = (sum over the window of exp(scale q_t.k_s) v_s + exp(gate) o_t) / the same of the weights.

    o_t is what a linear attention over the tokens older than the window adds up to. `gate_H` is learnt; `balance` sets
    it to where those tokens weigh as much, on average, as in softmax attention over everything. Its state is the keys
    and values of the last W tokens, (B, W, G, C) and (B, W, G, k); a row whose last value is 0 holds no token.
    """

    def __init__(self, *, size: int, heads: int, scale: float, rotate: Rotate | None = None) -> None:
        super().__init__()
        self.rotate = rotate
        self.size = size
        self.scale = float(scale)
        self.gate_H = nn.Parameter(torch.zeros(heads))
        self.core = Core("window_attention")

    def slide(
        self, past_BWGX: torch.Tensor, new_BTGX: torch.Tensor, steps: Steps | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(past and new, those that left the window as each new one came, the last W), along time."""
        all_BSGX = torch.cat([past_BWGX, new_BTGX], 1)
        return all_BSGX, all_BSGX[:, : -self.size], last(all_BSGX, self.size, steps)

    def forward(
        self, query_BTHC: torch.Tensor, key_BSGC: torch.Tensor, value_BSGk: torch.Tensor, older_BTHk: torch.Tensor
    ) -> torch.Tensor:
        if self.rotate is not None:
            tables = self.rotate.tables(key_BSGC.shape[1], key_BSGC)
            query_BTHC = self.rotate.turn(query_BTHC, tables, self.size)
            key_BSGC = self.rotate.turn(key_BSGC, tables)
        return self.core(self.scale * query_BTHC, key_BSGC, value_BSGk, older_BTHk, self.gate_H)

    @torch.no_grad()
    def balance(self, shares: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Choose the gate from what `shares` gave, one pair an example; without a token past the window, leave it."""
        wanted_HM, offset_HM = (torch.cat(rows, 1) for rows in zip(*shares, strict=True)) if shares else (None, None)
        if wanted_HM is None or offset_HM is None or not wanted_HM.shape[1]:
            return
        wanted_H = wanted_HM.mean(1)
        low_H, high_H = (torch.full_like(wanted_H, sign * _LARGEST_GATE) for sign in (-1, 1))
        for _ in range(_HALVINGS):  # the share grows with the gate
            middle_H = (low_H + high_H) / 2
            below_H = (offset_HM + middle_H.unsqueeze(1)).sigmoid().mean(1) < wanted_H
            low_H, high_H = torch.where(below_H, middle_H, low_H), torch.where(below_H, high_H, middle_H)
        self.gate_H.copy_((low_H + high_H) / 2)

    @torch.no_grad()
    def shares(
        self, query_BTHC: torch.Tensor, key_BTGC: torch.Tensor, older_BTHk: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries past the window: the older tokens' share of a softmax over all, and the log-odds of theirs here.

        Both (H, M). The odds are those of a gate of 0: the gate adds to them. Whole sequences, without a state.
        """
        time = query_BTHC.shape[1]
        if self.rotate is not None:
            query_BTHC, key_BTGC = self.rotate(query_BTHC), self.rotate(key_BTGC)
        rows_M = torch.arange(self.size, time, max(1, (time - self.size) // _QUERIES), device=query_BTHC.device)
        groups = key_BTGC.shape[2]
        wanted, offsets = [], []
        for query_THC, key_TGC, older_THk in zip(query_BTHC, key_BTGC, older_BTHk, strict=True):
            query_GRMC = query_THC[rows_M].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
            scores_HMT = (self.scale * query_GRMC @ key_TGC.permute(1, 2, 0).unsqueeze(1)).flatten(0, 1)
            age_MT = rows_M.unsqueeze(1) - torch.arange(time, device=rows_M.device)
            window_HM, older_HM = (
                scores_HMT.masked_fill(~seen_MT, -torch.inf).logsumexp(-1)
                for seen_MT in ((age_MT >= 0) & (age_MT < self.size), age_MT >= self.size)
            )
            wanted.append((older_HM - window_HM).sigmoid())
            # not below the smallest float: a head may have forgotten all that is older
            weight_HM = older_THk[rows_M, :, -1].mT.clamp_min(torch.finfo(older_THk.dtype).tiny)
            offsets.append(weight_HM.log() - window_HM)
        return torch.cat(wanted, 1), torch.cat(offsets, 1)
