"""B batch, T time, D width"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.causal_guides import family
from tests.hand_written import post_norm_encoder
from tests.kept_captures import capture
from tests.models import spread, vectors
from thesean.passes.analyse.block_facts import FoundBlock, find_block
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.record import evaluate
from thesean.passes.plan.partition import partition
from thesean.targets.shared.facts import NormFacts


def blocks(guide: Captured) -> tuple[list[FoundBlock | None], dict[Any, Any]]:
    flow, values = captured.flow_of(guide), captured.recorded(guide)
    return [find_block(flow, named.region, values) for named in partition(flow, "block")], values


def norm_of(norm: NormFacts | None, x_BTD: torch.Tensor) -> torch.Tensor:
    return x_BTD if norm is None else norm.of(x_BTD)


def stream_of(x_BTD: torch.Tensor, found: FoundBlock, causal: bool) -> torch.Tensor:
    """The block from its facts alone, up to its last sum."""
    facts = found.facts
    between_BTD = facts.between(x_BTD, causal)
    read_BTD = norm_of(facts.mlp_norm, between_BTD)
    if facts.attention_norm is None and facts.mlp_norm is not None:
        between_BTD = read_BTD  # norms after sums: the MLP's is added to what it reads
    elif not facts.in_a_row:
        mixed_BTV = facts.attention.mixed_values(norm_of(facts.attention_norm, x_BTD), causal)
        between_BTD = x_BTD + facts.attention.output.of(mixed_BTV)
    return between_BTD + facts.mlp.down.of(facts.mlp.hidden(read_BTD))


KINDS = {
    "gpt2": (captured.gpt2, True, True),
    "llama": (captured.llama, True, True),
    "gpt_neox": (lambda: family("gpt_neox"), True, False),
    "bloom": (lambda: family("bloom"), True, True),
    "qwen3": (lambda: family("qwen3"), True, True),
    "bert": (captured.bert, False, True),
    "post-norm encoder": (lambda: capture(spread(post_norm_encoder().eval()), vectors(3, 11, 16)), False, True),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_block_is_what_its_facts_say(name):
    make, causal, in_a_row = KINDS[name]
    guide = make()
    found, values = blocks(guide)
    assert len(found) >= 2
    for block in found:
        assert block is not None
        assert block.facts.in_a_row == in_a_row
        assert block.facts.attention.plain
        x_BTD = torch.randn(values[block.region.entry].shape, generator=torch.Generator().manual_seed(1))
        want_BTD = evaluate(block.region.nodes, values, {block.region.entry: x_BTD}, block.region.exit)
        torch.testing.assert_close(stream_of(x_BTD, block, causal), want_BTD, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("guide", [captured.bert, lambda: capture(post_norm_encoder().eval(), vectors(3, 11, 16))])
def test_a_norm_after_the_last_sum_is_not_the_blocks(guide):
    guide = guide()
    found, _ = blocks(guide)
    parts = partition(captured.flow_of(guide), "block")
    for block, part in zip(found, parts, strict=True):
        assert block is not None
        assert block.facts.attention_norm is None
        assert block.region.exit in part.region.exit.all_input_nodes
        assert "layer_norm" in part.region.exit.name


class Odd(nn.Module):
    """x_BTD -> y_BTD, two blocks of which `kind` says what they hold beside an attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attentions = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.ups = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(2):
            z = self.norms[2 * k](x)
            if self.kind == "a curve before the attention":
                z = z.tanh()
            attended = self.attentions[2 * k](z, z, z, need_weights=False)[0]
            if self.kind == "the MLP first":
                x = x + self.downs[k](self.ups[k](z).relu())
                z = self.norms[2 * k + 1](x)
                x = x + self.attentions[2 * k](z, z, z, need_weights=False)[0]
                continue
            x = x + attended
            z = x if self.kind == "no norm before the MLP" else self.norms[2 * k + 1](x)
            if self.kind == "a second attention":
                x = x + self.attentions[2 * k + 1](z, z, z, need_weights=False)[0]
            elif self.kind == "an MLP on all tokens":
                x = x + self.downs[k](self.ups[k](z).relu() + self.ups[k](z).relu().mean(1, keepdim=True))
            else:
                x = x + self.downs[k](self.ups[k](z).relu())
        return x


@pytest.mark.parametrize(
    ("kind", "is_block"),
    [
        ("an MLP", True),
        ("a curve before the attention", False),
        ("the MLP first", False),
        ("no norm before the MLP", False),
        ("a second attention", False),
        ("an MLP on all tokens", False),
    ],
)
def test_other_blocks_are_none(kind, is_block):
    found, _ = blocks(capture(spread(models.seeded(Odd, kind).eval()), vectors(3, 11, 16)))
    assert found
    assert [block is not None for block in found] == [is_block] * len(found)


def test_a_block_whose_branches_are_normed_before_they_are_added_is_none():
    found, _ = blocks(family("gemma3"))
    assert found
    assert not any(found)


def test_a_convnet_has_none():
    found, _ = blocks(captured.resnet())
    assert found
    assert not any(found)
