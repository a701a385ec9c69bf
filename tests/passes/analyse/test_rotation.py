"""B batch, T time, D width, H heads, C width of a head"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.captured import KERNELS
from thesean.passes.analyse.attention import find_attention
from thesean.passes.capture.capture import capture
from thesean.passes.plan.partition import partition
from thesean.targets.shared.facts import AttentionFacts
from thesean.targets.shared.rotation import Rotate, Rotation


def facts_of(guide, block: int = 0) -> AttentionFacts:
    part = partition(captured.flow_of(guide), "sublayer")[block]
    facts = find_attention(part.region, captured.recorded(guide))
    assert facts is not None
    return facts


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_rotation_of_llama_is_read_off_with_its_grouped_keys(kernel):
    facts = facts_of(captured.llama(attention=kernel))
    assert facts.plain
    assert facts.rotation is not None
    assert facts.rotation[:2] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert facts.rotation.angle == tuple(float(x) for x in 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8))


def test_an_attention_without_rotation_has_none():
    for guide in (captured.gpt2(), captured.bert()):
        facts = facts_of(guide)
        assert facts.plain
        assert facts.rotation is None


class Rotary(nn.Module):
    """One attention over x_BTD whose queries and keys are turned as `how` says, in a residual connection."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.frequency_P = nn.Buffer(torch.tensor([0.9, 0.3, 0.07, 0.002]))
        self.norms = nn.ModuleList(nn.RMSNorm(8, eps=eps) for eps in (1e-6, 1e-2))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2.0)  # type: ignore[arg-type]

    def turned(self, x_BHTC: torch.Tensor) -> torch.Tensor:
        angle_TP = torch.arange(x_BHTC.shape[2])[:, None] * self.frequency_P
        if self.how == "complex":
            pairs = torch.view_as_complex(x_BHTC.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_TP), angle_TP)).flatten(-2)
        if self.how == "part":
            angle_TP = angle_TP[:, :2]
        if self.how == "quick":
            angle_TP = 3 * angle_TP
        if self.how == "far":
            angle_TP = angle_TP**2
        cos, sin, count = angle_TP.cos(), angle_TP.sin(), angle_TP.shape[1]
        first, second, rest = x_BHTC.split([count, count, 8 - 2 * count], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.how == "norms":
            query, key = self.norms[0](query), self.norms[1](key)
        mixed = nn.functional.scaled_dot_product_attention(
            2 * self.turned(query), self.turned(key), value, is_causal=True
        )
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def rotary(how: str) -> AttentionFacts:
    return facts_of(capture(models.seeded(Rotary, how), models.vectors(2, 6, 16)))


@pytest.mark.parametrize(
    ("how", "pairs", "angles"),
    [
        ("halves", [(0, 4), (1, 5), (2, 6), (3, 7)], [0.9, 0.3, 0.07, 0.002]),
        ("complex", [(0, 1), (2, 3), (4, 5), (6, 7)], [0.9, 0.3, 0.07, 0.002]),
        ("part", [(0, 2), (1, 3)], [0.9, 0.3]),
        ("quick", [(0, 4), (1, 5), (2, 6), (3, 7)], [2.7, 0.9, 0.21, 0.006]),  # most of half a turn a step
    ],
)
def test_a_rotation_is_known_by_its_numbers(how, pairs, angles):
    facts = rotary(how)
    assert facts.plain
    assert facts.rotation is not None
    assert list(zip(*facts.rotation[:2], strict=True)) == pairs
    assert facts.rotation.angle == pytest.approx(angles, rel=1e-5)
    assert facts.scale == pytest.approx(2 * 8**-0.5)


def test_norms_of_queries_and_keys_before_the_rotation_are_read_off():
    facts = rotary("norms")
    assert facts.plain
    assert facts.rotation is not None
    assert facts.norms is not None
    guide = models.seeded(Rotary, "norms")
    for found, norm in zip(facts.norms, guide.norms, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(found.weight, norm.weight.detach(), rtol=1e-4, atol=1e-5)
        assert found.eps == pytest.approx(norm.eps, rel=1e-2, abs=1e-7)


def test_what_turns_by_the_square_of_the_step_is_no_rotation():
    facts = rotary("far")
    assert not facts.plain
    assert facts.rotation is None


def test_turned_vectors_meet_by_their_distance_alone():
    rotate = Rotate(Rotation((0, 1), (2, 3), (1.0, 0.01)), 4)
    x_11HC = models.vectors(1, 1, 1, 4)
    turned_SC = rotate(x_11HC.expand(1, 9000, 1, 4))[0, :, 0].double()
    products = [float(turned_SC[s] @ turned_SC[s + 5]) for s in (0, 1, 100, 8000, 8990)]
    assert products == pytest.approx([products[0]] * 5, abs=1e-5)
    angle = torch.tensor(5.0, dtype=torch.float64)
    x = x_11HC.flatten().double()
    want = (x[0] ** 2 + x[2] ** 2) * angle.cos() + (x[1] ** 2 + x[3] ** 2) * (0.01 * angle).cos()
    assert products[0] == pytest.approx(float(want), abs=1e-5)
