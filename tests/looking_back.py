"""Small causal networks that read earlier steps without an attention: each way in which that is written.

B batch, T time, D width
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import seeded, vectors
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured

WIDTH = 8


class LooksBack(nn.Module):
    """x_BTD -> y_BTD, the mixing twice, as `spelling` says, around a layer that works on each step alone."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.inner, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=2)
        self.wide = nn.Conv1d(WIDTH, WIDTH, 2, dilation=4, padding=4)
        self.plane = nn.Conv2d(1, 2, (3, 5), padding=(0, 2))
        self.back = nn.Conv2d(2, 1, (2, 3), padding=(1, 1))
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.taps = nn.Parameter(torch.ones(3, WIDTH) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mix = getattr(self, self.spelling)
        return self.last(mix(self.inner(mix(x)).tanh()))

    # convolutions

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        x_BDT = x.transpose(1, 2)
        return self.conv(torch.cat([x_BDT.new_zeros(x.shape[0], WIDTH, 2), x_BDT], 2)).transpose(1, 2)

    def trimmed(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wide(x.transpose(1, 2))[..., :-4].transpose(1, 2)

    def trimmed_late(self, x: torch.Tensor) -> torch.Tensor:
        """To the length of the input, behind what works on each number alone."""
        return x + F.silu(self.wide(x.mT)).mT[:, : x.shape[1]]

    def narrowed(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wide(x.mT).narrow(2, 0, x.shape[1]).mT

    def padded_at_both_ends(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.pad(x.mT, (2, 2)))[:, :, : x.shape[1]].mT

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        """Of time and frequency, the one padded in front and the other at both ends."""
        hidden = self.plane(F.pad(x.unsqueeze(1), (0, 0, 2, 0))).relu()
        return x + self.back(hidden)[:, :, :-1].squeeze(1)

    def padded_in_two_dimensions(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.avg_pool2d(F.pad(x.unsqueeze(1), (1, 1, 2, 0)), 3, 1).squeeze(1)

    # windows

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.avg_pool1d(F.pad(x.transpose(1, 2), (3, 0)), 4, 1).transpose(1, 2)

    def unfolded(self, x: torch.Tensor) -> torch.Tensor:
        return x + (F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1) * self.taps.T).sum(-1)

    def weighed(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 2, 0))
        return x + sum(tap * padded[:, at : at + x.shape[1]] for at, tap in enumerate(self.taps))

    # shifts

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        return self.taps[0] * x + (1 - self.taps[0]) * self.shift(x)

    def shifted_by_cat(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([torch.zeros_like(x[:, :2]), x[:, :-2]], 1)

    def joined_and_cut(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([x.new_zeros(x.shape[0], 1, WIDTH), x], 1)[:, :-1]

    def written(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.zeros_like(x)
        before[:, 1:] = x[:, :-1]
        return x + before

    def rolled(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.roll(x, 1, 1).clone()
        before[:, 0] = 0
        return x + before

    # sums

    def averaged(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.cumsum(1) / (1 + torch.arange(x.shape[1])[None, :, None])

    def averaged_by_a_view(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """By the mean and variance of all steps so far."""
        count = (1 + torch.arange(x.shape[1])[None, :, None]) * WIDTH
        mean = x.sum(2, keepdim=True).cumsum(1) / count
        square = (x * x).sum(2, keepdim=True).cumsum(dim=-2) / count
        return (x - mean) / (square - mean * mean + 1e-2).sqrt()

    def linear_attention(self, x: torch.Tensor) -> torch.Tensor:
        query, key = F.elu(x) + 1, F.elu(x * self.taps[1]) + 1
        product = torch.einsum("btk,btv->btkv", key, x).cumsum(1)
        return torch.einsum("btk,btkv->btv", query, product) / (query * key.cumsum(1)).sum(-1, keepdim=True)

    def in_double(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cumsum(x, 1, dtype=torch.float64).float().tanh()

    # products, sums of exponentials, largest and least values

    def scanned(self, x: torch.Tensor) -> torch.Tensor:
        """A gated recurrence in the logarithm, as a scan (Feng et al. 2024, arXiv 2410.01201, appendix B)."""
        gates, values = x * self.taps[0], F.softplus(x)
        decays_BTD = -F.softplus(gates).cumsum(1)
        joined_BTD = decays_BTD + (F.logsigmoid(gates) + values.log() - decays_BTD).logcumsumexp(1)
        return joined_BTD.exp()

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        return x + (1 - 0.1 * torch.sigmoid(x)).cumprod(1)

    def at_most(self, x: torch.Tensor) -> torch.Tensor:
        """By heads, time behind them."""
        heads_BHTC = x.unflatten(2, (2, -1)).transpose(1, 2)
        return x / (1 + heads_BHTC.abs().cummax(2).values.transpose(1, 2).flatten(2))

    def at_least(self, x: torch.Tensor) -> torch.Tensor:
        return x - torch.cummin(x, dim=-2)[0]

    # what looks ahead as well

    def both_ways_in_two_dimensions(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.conv2d(x.unsqueeze(1), self.plane.weight, padding=(1, 2)).relu()
        return x + F.conv2d(hidden, self.plane.weight.transpose(0, 1), padding=(1, 2)).squeeze(1)

    def as_long(self, x: torch.Tensor) -> torch.Tensor:
        """One zero in front and two behind."""
        return x + F.conv1d(x.mT, self.wide.weight.repeat(1, 1, 2), padding="same").mT

    def pooled_both_ways(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.avg_pool1d(F.pad(x.mT, (2, 1)), 4, 1).mT

    def symmetric(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.pad(x.mT, (1, 1))).mT

    # what is none of it

    def padded_by_ones(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.pad(x.mT, (2, 0), value=1.0)).mT

    def read_before_it_is_cut(self, x: torch.Tensor) -> torch.Tensor:
        longer = self.wide(x.mT)
        return x + longer[..., :-4].mT + longer.mean(-1).unsqueeze(1)

    def replicated(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.pad(x.mT, (2, 0), mode="replicate")).mT


CONVOLUTIONS = (
    "padded", "joined", "trimmed", "trimmed_late", "narrowed", "padded_at_both_ends", "planes",
    "padded_in_two_dimensions",
)  # fmt: skip
WINDOWS = ("pooled", "unfolded", "weighed")
SHIFTS = ("shifted", "shifted_by_cat", "joined_and_cut", "written", "rolled")
SUMS = ("averaged", "averaged_by_a_view", "normed", "linear_attention", "in_double")
FOLDS = ("scanned", "multiplied", "at_most", "at_least")
AHEAD = {"symmetric": 1, "both_ways_in_two_dimensions": 2, "as_long": 2, "pooled_both_ways": 1}  # steps
OTHERS = ("padded_by_ones", "read_before_it_is_cut", "replicated")


def looking_back(spelling: str) -> Captured:
    return capture(seeded(LooksBack, spelling).eval(), vectors(3, 11, WIDTH))
