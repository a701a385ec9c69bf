"""B batch, T time, H heads, D distances"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import zoo
from tests import models
from thesean.passes.analyse.attention import find_attention
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.distance_bias import find_distance_bias, has_lengths
from thesean.passes.analyse.padding import find_padding
from thesean.passes.capture.capture import capture
from thesean.passes.capture.probe import recorded_probe
from thesean.passes.plan.partition import partition
from thesean.targets.shared.distance_bias import HIDDEN, AddedBias, DistanceBias, Reach
from thesean.targets.shared.facts import AttentionFacts

pytestmark = pytest.mark.thorough  # tests/passes/plan/test_windowed_guides.py has one of each kind


def all_facts(model: nn.Module, inputs: Any) -> list[AttentionFacts]:
    """Of every attention, in order."""
    captured = capture(model, inputs)
    flow = data_flow(captured.graph_module.graph)
    values, _ = recorded_probe(captured, lambda values: find_padding(flow, values))
    found = (find_attention(part.region, values) for part in partition(flow, "sublayer"))
    return [facts for facts in found if facts is not None]


def small(name: str, **settings: Any) -> nn.Module:
    return zoo.Specimen(name=name, build=zoo.from_config(name, settings), inputs=zoo.tokens, targets=()).model()


def behind(facts: AttentionFacts, count: int) -> torch.Tensor:
    """(H, D) of the first distances."""
    assert facts.bias is not None
    return facts.bias.behind.of(torch.arange(count))


@pytest.mark.parametrize(("dynamic", "has"), [(None, True), ({"input": {0: "batch"}}, False)])
def test_a_guide_has_lengths_where_another_dimension_than_the_batch_is_free(dynamic, has):
    guide = capture(nn.LayerNorm(4), {"input": models.vectors(2, 6, 4)}, dynamic=dynamic)
    assert has_lengths(guide.graph_module.graph.output_node()) is has


SLOPES_H1 = torch.tensor([[2.0**-2], [2.0**-4], [2.0**-6], [2.0**-8]])


@pytest.mark.parametrize("inputs", [zoo.tokens, zoo.masked])
@pytest.mark.parametrize(
    ("name", "settings", "factor"),
    [("BloomForCausalLM", {}, 1), ("MptForCausalLM", {}, 1), ("FalconForCausalLM", {"alibi": True}, 8**-0.5)],
)
def test_alibi_is_a_slope_for_each_head_that_goes_on_for_ever(name, settings, factor, inputs):
    for facts in all_facts(small(name, **settings), inputs(2, 12, 0)):
        assert facts.plain
        torch.testing.assert_close(behind(facts, 3000), -SLOPES_H1 * factor * torch.arange(3000), rtol=1e-5, atol=1e-5)
        assert facts.scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize("inputs", [zoo.tokens, zoo.masked])
@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel", "MPNetModel"])
def test_a_relative_table_is_read_to_where_it_ends_in_both_directions(name, inputs):
    for facts in all_facts(small(name), inputs(2, 12, 0)):
        assert facts.plain
        assert facts.bias is not None
        # 16 buckets a side, the last one from 91 steps on; nothing past it
        assert facts.bias.sizes == [92, 92]
        assert not torch.cat([reach.slope_H for reach in facts.bias]).any()


def test_the_table_of_the_first_layer_serves_all_layers_of_t5():
    model = small("T5ForConditionalGeneration")
    facts = all_facts(model, zoo.seq2seq(2, 12, 0))
    assert len(facts) == 4
    for stack, layers in ((model.encoder, facts[:2]), (model.decoder, facts[2:])):
        attention = stack.block[0].layer[0].SelfAttention
        bias_HTT = attention.compute_bias(300, 300)[0].detach()
        for found in layers:
            assert found.plain
            assert found.scale == 1.0
            wanted_HD = bias_HTT[:, -1].flip(1) - bias_HTT[:, -1, -1:]
            torch.testing.assert_close(behind(found, 300), wanted_HD, rtol=1e-5, atol=1e-5)
    assert facts[0].bias is not None
    ahead_HD = facts[0].bias.ahead.of(torch.arange(300))
    bias_HTT = model.encoder.block[0].layer[0].SelfAttention.compute_bias(300, 300)[0].detach()
    torch.testing.assert_close(ahead_HD, bias_HTT[:, 0] - bias_HTT[:, 0, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "layer", "window"),
    [
        ("MistralForCausalLM", {"sliding_window": 6}, 0, 6),
        ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 4}, 1, 4),
        ("Cohere2ForCausalLM", {"sliding_window": 100}, 0, 100),
    ],
)
def test_a_sliding_window_hides_what_is_farther_away(name, settings, layer, window):
    facts = all_facts(small(name, **settings), zoo.tokens(2, 12, 0))[layer]
    assert facts.plain
    bias_HD = behind(facts, 2 * window)
    assert not bias_HD[:, :window].any()
    assert (bias_HD[:, window:] == HIDDEN).all()


class Written(nn.Module):
    """x + attention(x) with a bias on its scores, as people write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)
        self.slope_H = nn.Buffer(torch.tensor([0.5, 0.1]))
        self.table_HD = nn.Parameter(torch.randn(2, 25))
        self.content = nn.Linear(8, 1)

    def bias(self, distance_TT: torch.Tensor, query_BHTC: torch.Tensor) -> torch.Tensor:
        if self.how == "square":
            return -1e-4 * distance_TT.square() * self.slope_H.view(-1, 1, 1)
        if self.how == "table":
            return self.table_HD[:, distance_TT.clamp(-12, 12) + 12]
        if self.how == "steps":  # what comes in pairs of steps is no matter of distance
            return -0.5 * (distance_TT.abs() + torch.arange(distance_TT.shape[0]) % 2)
        if self.how == "content":
            return -distance_TT.abs() * self.content(query_BHTC).sigmoid()
        return -distance_TT.abs() * self.slope_H.view(-1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        step_T = torch.arange(x.shape[1])
        distance_TT = step_T.unsqueeze(1) - step_T
        bias = self.bias(distance_TT, q)
        if self.how == "causal":
            bias = bias.masked_fill(distance_TT < 0, float("-inf"))
        if self.how == "einsum":
            scores = torch.einsum("bihc,bjhc->bhij", q.transpose(1, 2) / 3, k.transpose(1, 2)) + bias
            mixed = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v.transpose(1, 2))
            return self.head(x + self.out(mixed.flatten(2)))
        if self.how == "bmm":
            batch, heads = q.shape[:2]
            rows = (t.reshape(batch * heads, -1, 8) for t in (q, k, v))
            q, k, v = rows
            scores = torch.baddbmm(bias.repeat(batch, 1, 1), q, k.transpose(1, 2), alpha=0.25)
            mixed = torch.bmm(scores.softmax(-1), v).view(batch, heads, -1, 8)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(x.shape[0], 2, -1, -1))
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


def written(how: str) -> AttentionFacts:
    (facts,) = all_facts(models.seeded(Written, how), models.vectors(2, 6, 16))
    return facts


@pytest.mark.parametrize(("how", "scale"), [("fused", 8**-0.5), ("causal", 8**-0.5), ("bmm", 0.25), ("einsum", 1.0)])
def test_alibi_by_hand_is_read_whatever_it_is_written_with(how, scale):
    facts = written(how)
    assert facts.plain
    assert facts.scale == pytest.approx(scale, rel=1e-5)
    slope_H1 = torch.tensor([[0.5], [0.1]])
    if how == "einsum":  # which divides queries where they are made
        torch.testing.assert_close(facts.query.bias_O, models.seeded(Written, how).qkv.bias.detach()[:16] / 3)
    torch.testing.assert_close(behind(facts, 900), -slope_H1 * torch.arange(900), rtol=1e-5, atol=1e-5)
    assert facts.bias is not None
    torch.testing.assert_close(facts.bias.ahead.slope_H, torch.zeros(2) if how == "causal" else -slope_H1[:, 0])


def test_a_learnt_table_by_hand_is_read_off():
    facts, model = written("table"), models.seeded(Written, "table")
    assert facts.plain
    wanted_HD = model.table_HD.detach()[:, 12:]
    torch.testing.assert_close(behind(facts, 13), wanted_HD - wanted_HD[:, :1], rtol=1e-5, atol=1e-5)
    assert torch.equal(behind(facts, 40)[:, 12:], behind(facts, 13)[:, 12:].expand(-1, 28))


def test_a_table_without_an_end_is_read_as_far_as_lengths_go():
    facts = written("square")
    assert facts.plain
    wanted_HD = -1e-4 * torch.tensor([[0.5], [0.1]]) * torch.arange(2048).square()
    torch.testing.assert_close(behind(facts, 2048), wanted_HD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", ["steps", "content"])
def test_a_bias_of_more_than_the_distance_is_told(how):
    facts = written(how)
    assert not facts.plain
    assert facts.bias is None
    assert facts.differs == "a bias on the scores that is no matter of distance alone"


@pytest.mark.parametrize(("error", "is_read"), [(0.0, True), (1e-6, True), (1e-2, False)])
def test_a_bias_is_of_the_distance_to_five_digits_whatever_a_mask_hides(error, is_read):
    step_T = torch.arange(24)
    scores_HTT = -0.25 * (step_T.unsqueeze(1) - step_T).float().expand(2, 24, 24).clone()
    scores_HTT.masked_fill_(step_T > step_T.unsqueeze(1), -1e9)
    scores_HTT[1, 20, 3] += error
    found = find_distance_bias(scores_HTT, None)
    assert (found is not None) == is_read
    if found is not None:
        torch.testing.assert_close(found.behind.slope_H, torch.full((2,), -0.25))


def test_a_capped_score_is_told():
    facts = all_facts(small("Gemma2ForCausalLM"), zoo.tokens(2, 12, 0))
    assert [(f.plain, f.differs) for f in facts] == [(False, "a cap on the scores")] * 2


def test_what_was_read_is_added_as_it_was_read():
    bias = DistanceBias(
        Reach(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([-2.0])), Reach(torch.tensor([[0.0, 5.0]]), torch.zeros(1))
    )
    want_TT = torch.tensor([[0.0, 5, 5, 5], [1, 0, 5, 5], [3, 1, 0, 5], [1, 3, 1, 0]])
    torch.testing.assert_close(bias.matrix(4, torch.zeros(1))[0], want_TT)
    module = AddedBias(1, bias.sizes)
    module.copy_from(bias)
    torch.testing.assert_close(module.bias.matrix(4, torch.zeros(1))[0], want_TT)
