"""What mixes over time without a matrix is a part like any other, and a plan's row and its verdict agree.

B batch, T time, D width
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models import vectors
from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target

Mix = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self, mix: Mix, residual: bool) -> None:
        super().__init__()
        self.mix, self.residual, self.norm = mix, residual, nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x) if self.residual else self.mix(x)
        return x + self.mlp(self.norm(x))


def fourier(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


def spectral(x: torch.Tensor) -> torch.Tensor:
    filtered = torch.fft.rfft(x, dim=1) * torch.linspace(0, 1, x.shape[1] // 2 + 1)[:, None]
    return torch.fft.irfft(filtered, n=x.shape[1], dim=1)


def running_mean(x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def shift(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x[:, :-1], (0, 0, 1, 0))


def roll(x: torch.Tensor) -> torch.Tensor:
    return torch.roll(x, 1, 1)


def pad(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 1, -1))


def pool(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool1d(x.mT, 3, 1, 1).mT - x


def order(x: torch.Tensor) -> torch.Tensor:
    return x.sort(1)[0]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (fourier, "bidirectional"),
        (spectral, "bidirectional"),
        (running_mean, "causal"),
        (shift, "causal"),
        (roll, "bidirectional"),
        (pad, "causal"),
        (pool, "bidirectional"),
        (order, "bidirectional"),
    ],
)
def test_mixing_without_a_matrix_is_replaced_and_the_mlp_beside_it_stays(mix, expected, residual):
    guide = capture(nn.Sequential(*(Block(mix, residual) for _ in range(2))).eval(), vectors(3, 9, 8))
    bound = make_plan(guide, Target("rnn"))
    assert [(p.path, p.mixing, len(p.replaces)) for p in bound.plan] == [("0", expected, 1), ("1", expected, 1)]
    left = {str(n.target) for n in build_hybrid(bound).graph_module.graph.nodes}
    assert "aten.gelu.default" in left
    assert not {"aten.fft_fft.default", "aten.fft_rfft.default", "aten.cumsum.default", "aten.roll.default"} & left
    assert not {"aten.pad.default", "aten.avg_pool1d.default", "aten.sort.default"} & left


def test_what_mixes_beside_a_part_that_does_not_is_told_with_the_name_that_takes_both():
    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True).expand_as(x)

    guide = capture(nn.Sequential(*(Block(mean, True) for _ in range(2))).eval(), vectors(3, 9, 8))
    with pytest.raises(PlanError, match=r"beside them has no weights\. parts=\['0'\] takes the whole of it"):
        make_plan(guide, Target("rnn"))
    found = make_plan(guide, Target("rnn"), parts=["[01]"]).plan
    assert [(p.path, p.mixing) for p in found] == [("0", "bidirectional"), ("1", "bidirectional")]


def test_a_part_that_mixes_where_nothing_can_be_cut_out_is_not_called_token_wise():
    class Everywhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            m = x.mean(1, keepdim=True).expand_as(x)
            return m + self.down(F.gelu(self.up(m)))

    guide = capture(nn.Sequential(Everywhere(), Everywhere()).eval(), vectors(3, 9, 8))
    with pytest.raises(TargetMismatchError, match=r"mixes over time \(bidirectional\).*scope='part'"):
        make_plan(guide, Target("rnn"), parts=["[01]"])
    whole = make_plan(guide, Target("rnn", scope="part"), parts=["[01]"]).plan
    assert {p.mixing for p in whole} == {"bidirectional"}
