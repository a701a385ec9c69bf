"""B batch, T time, D width, H heads"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.captured import KERNELS
from thesean.passes.analyse.attention import find_attention
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.capture.capture import capture
from thesean.passes.plan.partition import partition
from thesean.targets.shared.facts import AttentionFacts

Change = Callable[[torch.Tensor], torch.Tensor]


def attention_of(guide) -> AttentionFacts:
    part = partition(data_flow(guide.graph_module.graph), "sublayer")[0]
    facts = find_attention(part.region, captured.recorded(guide))
    assert facts is not None
    return facts


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert])
def test_attentions_with_learnt_positions_outside_are_plain(guide, kernel):
    assert attention_of(guide(attention=kernel)).plain


def test_attention_of_torch_is_plain():
    assert attention_of(captured.encoder()).plain


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_rotary_embedding_that_was_read_off_is_plain(kernel):
    assert attention_of(captured.llama(attention=kernel)).plain


class Attention(nn.Module):
    """x + attention(x), twice; `scores` and `values` change what a plain one has there."""

    def __init__(self, scores: Change, values: Change) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.scores, self.values = scores, values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            mixed = self.scores(q @ k.transpose(2, 3) * 0.5).softmax(-1) @ self.values(v)
            x = x + out(mixed.transpose(1, 2).flatten(2))
        return self.head(x)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def distance(scores_BHTT: torch.Tensor) -> torch.Tensor:
    """A bias that falls with the distance: Press et al. 2022."""
    t = torch.arange(scores_BHTT.shape[-1])
    return scores_BHTT - 0.5 * (t.view(-1, 1) - t).abs()


def causal(scores_BHTT: torch.Tensor) -> torch.Tensor:
    t = torch.arange(scores_BHTT.shape[-1])
    return scores_BHTT.masked_fill(t.view(-1, 1) < t, float("-inf"))


def window(scores_BHTT: torch.Tensor) -> torch.Tensor:
    t = torch.arange(scores_BHTT.shape[-1])
    return causal(scores_BHTT).masked_fill(t.view(-1, 1) - t > 3, float("-inf"))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("scores", "values", "plain"),
    [
        (same, same, True),
        (causal, same, True),
        (lambda s: 3 * s, same, True),
        (distance, same, True),
        (window, same, True),
        (lambda s: 2 * torch.tanh(s / 2), same, False),
        (same, torch.tanh, False),
    ],
    ids=["plain", "causal", "scaled", "distance", "window", "soft cap", "changed values"],
)
def test_what_is_added_to_a_softmax_is_seen(scores, values, plain):
    torch.manual_seed(0)
    model = Attention(scores, values).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    guide = capture(model, models.vectors(2, 6, 8))
    part = partition(data_flow(guide.graph_module.graph), "sublayer")[0]
    facts = find_attention(part.region, captured.recorded(guide))
    assert (facts is not None and facts.plain) == plain
