"""What a linear attention adds to keep the guide's softmax over the last W tokens, and the first few.

B batch, T time, S = W + T, H heads of queries, G heads of keys and values, C width of queries and keys, k = K + 1
columns of the values, the last of ones, X = C + k: a token's key, then its value, N sinks, F features, M queries that
are looked at
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from thesean.kernels.shared.precision import wide
from thesean.targets.shared.core import Core
from thesean.targets.shared.distance_bias import LearntReach
from thesean.targets.shared.lookahead import InPlace
from thesean.targets.shared.rotation import Rotate
from thesean.targets.shared.signed_softmax import features
from thesean.targets.shared.sinks import First, Sinks, add_sinks
from thesean.targets.shared.steps import Steps, last

# Queries of one sequence that the balance is chosen on, spread evenly: all would take memory quadratic in time.
_QUERIES = 128

# The gates that are tried. e^24 is far beyond what any score of a trained attention makes up for.
_LARGEST_GATE, _GATES = 24.0, 97


class Looked(NamedTuple):
    """What some queries of a batch see: softmax over everything, and what the window and the older tokens come to."""

    wanted_HMK: torch.Tensor
    near_HMK: torch.Tensor
    older_HMK: torch.Tensor
    odds_HM: torch.Tensor  # log-odds of the older tokens at a gate of 0; the gate adds to them


class Window(nn.Module):
    """y_t = (sum over window and sinks of exp(scale q_t.k_s + bias) v_s + exp(gate) o_t) / the same of the weights.

    `bias` is that of the distance t - s, where there is one. With `ahead` the queries are those of so many steps before
    the window's last row; the bias then begins at that row. o_t is what a linear attention over all other tokens adds
    up to. `gate_H` is learnt; `balance` sets it to where the mean is nearest to softmax attention over everything. Its
    state is the linear one, (B, G, F, k), and the keys and values of the sinks and of the last W tokens in one,
    (B, G, N + W, X); a row whose last value is 0 holds no token.
    """

    operation = "window"  # what an export writes for it: deploy/lowering/forms/window.py

    def __init__(
        self,
        *,
        size: int,
        heads: int,
        scale: float,
        rotate: Rotate | None = None,
        sinks: int = 0,
        bias: LearntReach | None = None,
        ahead: int = 0,
    ) -> None:
        super().__init__()
        self.rotate = rotate
        self.size = size
        self.ahead = ahead
        self.scale = float(scale)
        self.gate_H = nn.Parameter(torch.zeros(heads))
        self.core = Core("window_attention")
        self.linear = Core("linear_attention")
        self.sinks = Sinks(size=sinks, window=size - ahead, rotate=rotate) if sinks else None
        self.bias = bias

    @property
    def places(self) -> int:
        """N, of the sinks."""
        return 0 if self.sinks is None else self.sinks.size

    def initial_state(self, x_BTD: torch.Tensor, groups: int, widths: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """For keys and values of these widths, C and k."""
        batch, (key, value) = x_BTD.shape[0], widths
        linear = x_BTD.new_zeros(batch, groups, 2 * key, value)
        return linear, x_BTD.new_zeros(batch, groups, self.places + self.size, key + value)

    def slide(
        self, past_BWGX: torch.Tensor, new_BTGX: torch.Tensor, steps: Steps | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(past and new, those that left the window as each new one came, the last W), along time."""
        all_BSGX = torch.cat([past_BWGX, new_BTGX], 1)
        return all_BSGX, all_BSGX[:, : -self.size], last(all_BSGX, self.size, steps)

    def forward(
        self,
        query_BTHC: torch.Tensor,
        new_BTGX: torch.Tensor,
        log_decay_BTG: torch.Tensor,
        maps: tuple[torch.Tensor, torch.Tensor],
        state: tuple[torch.Tensor, torch.Tensor],
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """mean_BTHK and the state; `maps` are those of the features of queries and keys."""
        linear, held_BGMX = state
        first_BNGX, past_BWGX = held_BGMX.transpose(1, 2).split([self.places, self.size], 1)
        all_BSGX, left_BTGX, past_BWGX = self.slide(past_BWGX, new_BTGX, steps)
        if steps is not None:
            left_BTGX = steps.hide_left(left_BTGX)
        older_BTHk, linear, first, first_BNGX = self.older(
            query_BTHC, left_BTGX, log_decay_BTG, maps, (linear, first_BNGX)
        )
        mean_BTHK = self.mean(query_BTHC, all_BSGX, older_BTHk, first)
        if isinstance(steps, InPlace):  # a window without a token has no mean
            mean_BTHK = mean_BTHK.masked_fill(mean_BTHK.isnan(), 0.0)
        return mean_BTHK, (linear, torch.cat([first_BNGX, past_BWGX], 1).transpose(1, 2))

    def older(
        self,
        query_BTHC: torch.Tensor,
        left_BTGX: torch.Tensor,
        log_decay_BTG: torch.Tensor,
        maps: tuple[torch.Tensor, torch.Tensor],
        state: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, First | None, torch.Tensor]:
        """What the tokens that left the window add up to for each query, the state with them, and the sinks, as a chunk
        meets them and as they are after it.

        Where no token left yet, the values and their column of ones are zero, so that the features of no key count.
        """
        linear, first_BNGX = state
        width, first = query_BTHC.shape[-1], None
        key_BTGC, value_BTGk = left_BTGX[..., :width], left_BTGX[..., width:]
        if self.sinks is not None:
            first_BNGX, count_BT = self.sinks.take(first_BNGX, left_BTGX)
            first = First(first_BNGX[..., :width], first_BNGX[..., width:], count_BT)
            value_BTGk = value_BTGk * self.sinks.full(count_BT).to(value_BTGk.dtype).unsqueeze(-1).unsqueeze(-1)
        query_BTHF, key_BTGF = features(query_BTHC, maps[0]), features(key_BTGC, maps[1])
        older_BTHk, linear = self.linear(query_BTHF, key_BTGF, value_BTGk, log_decay_BTG, linear)
        return older_BTHk, linear, first, first_BNGX

    def mean(
        self, query_BTHC: torch.Tensor, all_BSGX: torch.Tensor, older_BTHk: torch.Tensor, first: First | None
    ) -> torch.Tensor:
        width = query_BTHC.shape[-1]
        key_BSGC, value_BSGk = all_BSGX[..., :width], all_BSGX[..., width:]
        gate: torch.Tensor = self.gate_H
        if first is not None:
            scores_BTHN, value_BNGk = self._of_sinks(query_BTHC, first)
            older_BTHk, gate = add_sinks(scores_BTHN, value_BNGk, older_BTHk, gate)
        if self.rotate is not None:
            tables = self.rotate.tables(key_BSGC.shape[1], key_BSGC)
            query_BTHC = self.rotate.turn(query_BTHC, tables, self.size - self.ahead)
            key_BSGC = self.rotate.turn(key_BSGC, tables)
        bias = () if self.bias is None else (self._bias(0, self.size).to(query_BTHC.dtype),)
        mean_BTHK: torch.Tensor = self.core(self.scale * query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate, *bias)
        return mean_BTHK

    def _bias(self, nearest: int, count: int) -> torch.Tensor:
        """(H, count) of the distances from `nearest` on."""
        assert self.bias is not None
        return self.bias.reach.of(torch.arange(nearest, nearest + count, device=self.gate_H.device))

    def _of_sinks(self, query_BTHC: torch.Tensor, first: First) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and values, in the precision that the kernel computes in."""
        assert self.sinks is not None
        query, key, value = (wide(x) for x in (query_BTHC, first.key_BNGC, first.value_BNGk))
        scores_BTHN = self.sinks.scores(self.scale * query, key, first.count_BT)
        if self.bias is not None:  # right before the window, where a rotation has them too
            scores_BTHN = scores_BTHN + self._bias(self.size, self.sinks.size).flip(1).to(scores_BTHN)
        return scores_BTHN, value

    @torch.no_grad()
    def balance(self, looked: Sequence[Looked]) -> None:
        """Choose each head's gate by its error; without a token past the window, leave it.

        The least gate leaves the older tokens out: a head that they don't bring nearer keeps window and sinks alone.
        """
        looked = [each for each in looked if each.odds_HM.shape[1]]
        if not looked:
            return
        gates = torch.linspace(-_LARGEST_GATE, _LARGEST_GATE, _GATES)
        errors_NH = torch.stack([torch.stack([_error(each, float(g)) for each in looked]).sum(0) for g in gates])
        self.gate_H.copy_(gates.to(self.gate_H)[errors_NH.argmin(0)])

    @torch.no_grad()
    def look(
        self,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        older_BTHk: torch.Tensor,
        first: First | None = None,
    ) -> Looked:
        """Queries past the window of whole sequences, without a state."""
        query_BTHC, key_BTGC, value_BTGk = (wide(x) for x in projected)
        older_BTHk = wide(older_BTHk)
        time = query_BTHC.shape[1]
        rows_M = torch.arange(self.size, time, max(1, (time - self.size) // _QUERIES), device=query_BTHC.device)
        sinks = (None, None) if first is None else self._of_sinks(query_BTHC, first)
        if self.rotate is not None:
            own_BTHC = self.rotate(query_BTHC[:, self.ahead :])
            query_BTHC = F.pad(own_BTHC, (0, 0, 0, 0, self.ahead, 0))
            key_BTGC = self.rotate(key_BTGC)
        age_MT = rows_M.unsqueeze(1) - torch.arange(time, device=rows_M.device)
        repeats = query_BTHC.shape[2] // key_BTGC.shape[2]
        examples = []
        for b in range(len(query_BTHC)):
            key_THC, value_THk = (x[b].repeat_interleave(repeats, 1) for x in (key_BTGC, value_BTGk))
            query_HMC, key_HCT = query_BTHC[b, rows_M].transpose(0, 1), key_THC.permute(1, 2, 0)
            scores_HMT = self.scale * query_HMC @ key_HCT
            if self.bias is not None:
                scores_HMT = scores_HMT + self.bias.reach.of(age_MT.clamp_min(0)).to(scores_HMT)
            scores_HMT = scores_HMT.masked_fill(age_MT < 0, -torch.inf)
            value_HTk = value_THk.transpose(0, 1)
            wanted_HMK = scores_HMT.softmax(-1) @ value_HTk[..., :-1]
            scores_HMT = scores_HMT.masked_fill(age_MT >= self.size, -torch.inf)
            if sinks[0] is not None and sinks[1] is not None:
                scores_HMT = torch.cat([scores_HMT, sinks[0][b, rows_M].transpose(0, 1)], -1)
                value_HNk = sinks[1][b].repeat_interleave(repeats, 1).transpose(0, 1)
                value_HTk = torch.cat([value_HTk, value_HNk], 1)
            near_HMK = scores_HMT.softmax(-1) @ value_HTk[..., :-1]
            # not below the smallest float: a head may have forgotten all that is older
            weight_HM1 = older_BTHk[b, rows_M, :, -1:].transpose(0, 1).clamp_min(torch.finfo(older_BTHk.dtype).tiny)
            older_HMK = older_BTHk[b, rows_M, :, :-1].transpose(0, 1) / weight_HM1
            odds_HM = weight_HM1.squeeze(-1).log() - scores_HMT.logsumexp(-1)
            examples.append(Looked(wanted_HMK, near_HMK, older_HMK, odds_HM))
        return Looked(*(torch.cat(rows, 1) for rows in zip(*examples, strict=True)))


def _error(looked: Looked, gate: float) -> torch.Tensor:
    """Squared error of each head's mean, (H)."""
    share_HM1 = (looked.odds_HM + gate).sigmoid().unsqueeze(-1)
    mean_HMK = looked.near_HMK + share_HM1 * (looked.older_HMK - looked.near_HMK)
    return (mean_HMK - looked.wanted_HMK).square().sum((1, 2))
