"""The first tokens of each row, which a window never lets go of.

Trained attentions put much of their weight on the first tokens, whatever these are (Xiao et al. 2024, StreamingLLM): a
window that loses them loses what its softmax was divided by.

B batch, T time, W window, N sinks, H heads of queries, G heads of keys and values, C width of queries and keys,
k = K + 1 columns of the values, the last of ones, X = C + k: a token's key, then its value
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from thesean.targets.shared.rotation import Rotate


class First(NamedTuple):
    """The sinks as a chunk of T steps meets them, those taken in on the way too."""

    key_BNGC: torch.Tensor
    value_BNGk: torch.Tensor
    count_BT: torch.Tensor  # places taken up to each step


class Sinks(nn.Module):
    """Tokens that leave the window are kept here until all N places are taken. A place whose value's last column is 0
    holds none.

    Under a rotation they stand right before the window, however far they are: distances that the guide was never
    trained on don't occur, and no step has to be counted.
    """

    def __init__(self, *, size: int, window: int, rotate: Rotate | None = None) -> None:
        super().__init__()
        self.size = size
        self.window = window
        self.rotate = rotate

    def take(self, first_BNGX: torch.Tensor, left_BTGX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(first_BNGX with those of the tokens that left taken in, how many places were taken up to each step)."""
        left_BT = left_BTGX[:, :, 0, -1] > 0
        before_B1 = (first_BNGX[:, :, 0, -1] > 0).sum(1, keepdim=True)
        count_BT = before_B1 + left_BT.to(torch.int64).cumsum(1)
        place_N = torch.arange(self.size, device=left_BT.device)
        at_BTN = (left_BT.unsqueeze(-1) & (count_BT.unsqueeze(-1) - 1 == place_N)).to(left_BTGX.dtype)
        return first_BNGX + torch.einsum("btn,btgx->bngx", at_BTN, left_BTGX), count_BT

    def full(self, count_BT: torch.Tensor) -> torch.Tensor:
        """Whether a token that left found no place."""
        return count_BT > self.size

    def scores(self, query_BTHC: torch.Tensor, key_BNGC: torch.Tensor, count_BT: torch.Tensor) -> torch.Tensor:
        """q.k of each query with each place, (B, T, H, N); -inf where it was still empty at that step."""
        if self.rotate is not None:
            tables = self.rotate.tables(self.size + self.window, key_BNGC)
            last = (table[-1:] for table in tables)
            query_BTHC = self.rotate.turn_by(query_BTHC, *last)
            key_BNGC = self.rotate.turn(key_BNGC, tables)
        groups = key_BNGC.shape[2]
        query_BGTRC = query_BTHC.unflatten(2, (groups, -1)).transpose(1, 2)
        key_BGCN = key_BNGC.permute(0, 2, 3, 1)
        scores_BGTRN = (query_BGTRC.flatten(2, 3) @ key_BGCN).unflatten(2, query_BGTRC.shape[2:4])
        scores_BTHN = scores_BGTRN.transpose(1, 2).flatten(2, 3)
        place_N = torch.arange(self.size, device=count_BT.device)
        empty_BT1N = (count_BT.unsqueeze(-1) <= place_N).unsqueeze(2)
        return scores_BTHN.masked_fill(empty_BT1N, -torch.inf)


def add_sinks(
    scores_BTHN: torch.Tensor, value_BNGk: torch.Tensor, older_BTHk: torch.Tensor, gate_H: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(gate) older + sum over the sinks of exp(score) v, as sums_BTHk below exp(scale_BTH): (sums, scale)."""
    top_BTH = torch.maximum(scores_BTHN.detach().amax(-1), gate_H.detach())
    weights_BTHN = (scores_BTHN - top_BTH.unsqueeze(-1)).exp()
    groups = value_BNGk.shape[2]
    weights_BGTRN = weights_BTHN.unflatten(2, (groups, -1)).transpose(1, 2)
    sums_BGTRk = (weights_BGTRN.flatten(2, 3) @ value_BNGk.transpose(1, 2)).unflatten(2, weights_BGTRN.shape[2:4])
    sums_BTHk = sums_BGTRk.transpose(1, 2).flatten(2, 3)
    return sums_BTHk + older_BTHk * (gate_H - top_BTH).exp().unsqueeze(-1), top_BTH
