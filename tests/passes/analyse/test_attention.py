"""B batch, T time, D width, H heads, K head width"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import captured, models
from tests.captured import KERNELS
from tests.models import seeded
from thesean.passes.analyse.attention import _holds_heads, find_attention
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.regions import module_regions
from thesean.passes.capture.capture import capture
from thesean.passes.graph.record import record
from thesean.passes.plan.partition import partition
from thesean.targets.shared.facts import Affine


def attention_of(guide, path):
    region = module_regions(captured.flow_of(guide))[path]
    facts = find_attention(region, captured.recorded(guide))
    assert facts is not None
    return facts


def equal(affine: Affine, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
    torch.testing.assert_close(affine.weight_OI, weight_OI, rtol=1e-4, atol=1e-5)
    expected = torch.zeros(len(weight_OI)) if bias_O is None else bias_O
    torch.testing.assert_close(affine.bias_O, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_projections_of_gpt2_are_read_off(kernel):
    guide, model = captured.gpt2(attention=kernel), models.gpt2(attention=kernel)
    attention = model.transformer.h[1].attn
    facts = attention_of(guide, "transformer.h.1.attn")
    assert facts.heads == facts.kv_heads == 2
    assert facts.scale == pytest.approx(8**-0.5)
    weights, biases = attention.c_attn.weight.T.chunk(3), attention.c_attn.bias.chunk(3)
    for affine, weight, bias in zip((facts.query, facts.key, facts.value), weights, biases, strict=True):
        equal(affine, weight, bias)
    equal(facts.output, attention.c_proj.weight.T, attention.c_proj.bias)


@pytest.mark.parametrize("kernel", KERNELS)
def test_separate_projections_of_bert_are_read_off(kernel):
    guide, model = captured.bert(attention=kernel), models.bert(attention=kernel)
    attention = model.encoder.layer[0].attention
    (part, *_) = partition(captured.flow_of(guide), "sublayer")
    facts = find_attention(part.region, captured.recorded(guide))
    assert facts is not None
    assert facts.heads == 2
    assert facts.scale == pytest.approx(8**-0.5)
    for affine, layer in (
        (facts.query, attention.self.query),
        (facts.key, attention.self.key),
        (facts.value, attention.self.value),
        (facts.output, attention.output.dense),
    ):
        equal(affine, layer.weight, layer.bias)


@pytest.mark.parametrize("kernel", KERNELS)
def test_grouped_keys_and_values_of_llama_are_repeated_for_their_queries(kernel):
    guide, model = captured.llama(attention=kernel), models.llama(attention=kernel)
    attention = model.model.layers[0].self_attn
    facts = attention_of(guide, "model.layers.0.self_attn")
    assert facts.heads == 4
    assert facts.kv_heads == 2
    assert facts.scale == pytest.approx(8**-0.5)
    for affine, layer in zip(facts.grouped(2), (attention.k_proj, attention.v_proj), strict=True):
        equal(affine, layer.weight, layer.bias)
    equal(facts.query, attention.q_proj.weight, attention.q_proj.bias)
    for affine, layer in ((facts.key, attention.k_proj), (facts.value, attention.v_proj)):
        weight = layer.weight.view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)
        equal(affine, weight, layer.bias.view(2, 8).repeat_interleave(2, 0).flatten())
    equal(facts.output, attention.o_proj.weight, attention.o_proj.bias)


def test_multihead_attention_of_torch_is_read_off():
    guide, model = captured.encoder(), models.encoder()
    attention = model.encoder.layers[1].self_attn
    facts = attention_of(guide, "encoder.layers.1.self_attn")
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for affine, weight, bias in zip((facts.query, facts.key, facts.value), weights, biases, strict=True):
        equal(affine, weight, bias)
    equal(facts.output, attention.out_proj.weight, attention.out_proj.bias)


class KeyPadding(nn.Module):
    """torch's own attention, twice, with the steps that it may not read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor, hidden_BT: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, key_padding_mask=hidden_BT, need_weights=False)[0]
        return x


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_one_row_for_all_queries_is_no_bias(dtype):
    hidden_BT = torch.zeros(2, 6, dtype=dtype)
    guide = capture(models.seeded(KeyPadding), (models.vectors(2, 6, 8), hidden_BT))
    facts = attention_of(guide, "layers.1")
    assert facts.plain
    assert facts.bias is None


class Attention(nn.Module):
    """One written-out attention with a scale of its own, in a residual connection, twice."""

    def __init__(self, scale: float, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 24, bias=False) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.scale, self.fused = scale, fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            if self.fused:
                mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
            else:
                mixed = ((q * 2) @ k.transpose(2, 3) * (self.scale / 2)).softmax(-1) @ v
            x = x + out(mixed.transpose(1, 2).flatten(2))
        return self.head(x)


@pytest.mark.parametrize("fused", [True, False])
def test_a_scale_of_its_own_is_found(fused):
    torch.manual_seed(0)
    model = Attention(0.7, fused).eval()
    guide = capture(model, models.vectors(2, 6, 8))
    part = partition(data_flow(guide.graph_module.graph), "sublayer")[0]
    facts = find_attention(part.region, captured.recorded(guide))
    assert facts is not None
    scores = facts.scale * facts.query.weight_OI.T @ facts.key.weight_OI
    query, key, _ = model.qkv[0].weight.chunk(3)
    torch.testing.assert_close(scores, 0.7 * query.T @ key, rtol=1e-4, atol=1e-5)


def test_regions_without_attention_have_none():
    guide = captured.gpt2()
    region = module_regions(captured.flow_of(guide))["transformer.h.0.mlp"]
    assert find_attention(region, captured.recorded(guide)) is None
    guide = captured.resnet()
    assert find_attention(partition(captured.flow_of(guide))[0].region, captured.recorded(guide)) is None


def test_a_region_with_two_attentions_has_no_single_one():
    guide = captured.gpt2()
    first, second = (p.region for p in partition(captured.flow_of(guide)))
    both = type(first)(entry=first.entry, exit=second.exit, nodes=(*first.nodes, *second.nodes))
    assert find_attention(both, captured.recorded(guide)) is None


@pytest.mark.parametrize(
    ("shape", "holds"),
    [((2, 4, 5, 8), True), ((2, 5, 4, 8), True), ((8, 4, 5, 3), False), ((2, 5, 32), True), ((2, 5, 64), True),
     ((2, 5, 12), False), ((2, 5, 128), False), ((3, 5, 32), False), ((10, 32), False), ((2, 4, 5, 8, 1), False)],
)  # fmt: skip
def test_heads_are_held_by_four_dimensions_or_in_the_width(shape, holds):
    """Of 2 examples, 8 heads of width 8, 5 steps."""
    assert _holds_heads(torch.ones(shape), torch.ones(2, 8, 5, 8), 8) == holds
    assert not _holds_heads(shape, torch.ones(2, 8, 5, 8), 8)


class Placed(nn.Module):
    """x_BTD -> y_BTD, one attention over a fixed number of places, each with a position of its own."""

    def __init__(self, places: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.place, self.all = nn.Parameter(torch.randn(places, width)), nn.Linear(width, 3 * width)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.place
        query, key, value = self.all(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("places", "width", "heads"), [(8, 16, 2), (8, 8, 2), (16, 16, 1)])
def test_as_many_places_as_features_are_not_taken_for_them(places: int, width: int, heads: int):
    guide = capture(seeded(Placed, places, width, heads), torch.randn(2, places, width))
    flow = data_flow(guide.graph_module.graph)
    values = record(guide.graph_module, {"x": torch.randn(2, places, width)})
    found = [find_attention(part.region, values) for part in partition(flow, "sublayer")]
    assert [facts.plain for facts in found if facts is not None] == [True]
