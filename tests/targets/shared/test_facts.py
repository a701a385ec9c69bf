"""B batch, T time, D width of the part, H heads, K width of a head's query and key"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.targets.contract import affine, attention, block, feature_map, perceptron, sequence
from thesean.targets import Affine, NormFacts, PartFacts
from thesean.targets.shared.distance_bias import DistanceBias, Reach
from thesean.targets.shared.facts import attend
from thesean.targets.shared.head_norm import HeadNorm

SIMPLE = HeadNorm(torch.rand(4) + 0.5, 1e-6)
EACH = HeadNorm(torch.rand(4, 4) + 0.5, 1e-2, torch.rand(4, 4))
TOGETHER = EACH._replace(whole=True)


@pytest.mark.parametrize(
    ("norms", "form"),
    [
        (None, None), ((SIMPLE, SIMPLE), None), ((SIMPLE, EACH), "heads"), ((EACH, SIMPLE), "heads"),
        ((TOGETHER, EACH), "whole"), ((SIMPLE, TOGETHER), "whole"),
    ],
)  # fmt: skip
def test_norms_of_query_and_key_take_the_form_of_the_more_demanding_one(norms, form):
    facts = replace(attention(), norms=norms)
    assert facts.norm_form == form
    assert facts.norm_eps == (None if norms is None else [norms[0].eps, norms[1].eps])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition_and_hidden_tokens_are_not_seen(causal, biased, masked):
    """Two heads of keys and values for four of queries; a token that is hidden sees itself and what is not."""
    query, key, value = torch.randn(2, 6, 4, 3), torch.randn(2, 6, 2, 3), torch.randn(2, 6, 2, 5)
    mask_BT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    bias = DistanceBias(Reach(torch.randn(4, 3), torch.randn(4)), Reach(torch.randn(4, 2), torch.randn(4)))
    scores = 0.3 * torch.einsum("bthk,bshk->bhts", query, key.repeat_interleave(2, 2))
    if biased:
        scores = scores + bias.matrix(6, query)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    if masked:
        seen = mask_BT.view(2, 1, 1, 6) | torch.eye(6, dtype=torch.bool)
    if causal:
        seen = seen & torch.ones(6, 6, dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = torch.einsum("bhts,bshv->bthv", weights, value.repeat_interleave(2, 2)).flatten(2)
    found = attend(query, key, value, 0.3, causal, mask_BT if masked else None, bias if biased else None)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_heads_widths_are_read_off_the_projections():
    facts = replace(attention(), key=affine(12, 16, 1), query=affine(12, 16, 0), value=affine(8, 16, 2))
    assert facts.widths == (3, 2)
    assert [facts.frame[name] for name in ("heads", "key_width", "value_width", "scale")] == [4, 3, 2, 0.5]
    assert all(facts.frame[name] is None for name in ("rotation", "norm_eps", "norm_form"))


def test_hidden_neurons_are_gated_where_there_is_a_gate():
    x, mlp = torch.randn(3, 16), perceptron()
    up = F.linear(x, *mlp.up)
    torch.testing.assert_close(mlp.hidden(x), F.gelu(up))
    gated = replace(mlp, gate=affine(32, 16, 5))
    torch.testing.assert_close(gated.hidden(x), F.gelu(F.linear(x, *affine(32, 16, 5))) * up)
    assert mlp.width == 32


@pytest.mark.parametrize("centred", [False, True])
def test_a_map_that_takes_in_a_norms_weight_and_bias_reads_it_bare(centred):
    norm = NormFacts(torch.rand(16) + 0.5, torch.randn(16), 0.1, centred)
    x, reader = 3 * torch.randn(5, 16) + 1, affine(4, 16, 0)
    middle = x.mean(-1, keepdim=True) if centred else 0
    scaled = (x - middle) / ((x - middle).square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm.bare.of(x), scaled)
    torch.testing.assert_close(norm.of(x), scaled * norm.weight_D + norm.bias_D)
    torch.testing.assert_close(norm.fold(reader).of(norm.bare.of(x)), reader.of(norm.of(x)))


@pytest.mark.parametrize(("in_a_row", "plain", "adds"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_an_mlp_reads_the_attention_before_it_where_that_is_known_whole(in_a_row, plain, adds):
    given = block(in_a_row=in_a_row)
    x_BTD, found = torch.randn(2, 5, 16), replace(given, attention=replace(given.attention, plain=plain))
    assert given.attention_norm is not None
    for causal in (False, True):
        mixed_BTV = given.attention.mixed_values(given.attention_norm.of(x_BTD), causal)
        wanted = x_BTD + adds * given.attention.output.of(mixed_BTV)
        torch.testing.assert_close(found.between(x_BTD, causal), wanted)
    bare = replace(found, attention_norm=None)
    wanted = x_BTD + adds * given.attention.output.of(given.attention.mixed_values(x_BTD, True))
    torch.testing.assert_close(bare.between(x_BTD, True), wanted)


def shaped(*, into: tuple[int | str, ...], out: tuple[int | str, ...], channels_first: bool = False) -> PartFacts:
    return replace(sequence(), input_shape=into, output_shape=out, channels_first=channels_first)


def test_a_sequence_is_batch_time_and_width_on_both_sides():
    three, two = ("batch", "time", 16), ("batch", 16)
    assert shaped(into=three, out=three).is_sequence
    assert not shaped(into=three, out=three, channels_first=True).is_sequence
    assert not shaped(into=three, out=two).is_sequence
    assert not shaped(into=two, out=two).is_sequence


def test_a_module_runs_once_a_token_or_once_an_image():
    sizes = {"batch": 3, "time": 7}
    assert sequence().rows(sizes) == 21
    assert sequence(time=12).rows(sizes) == 36
    assert sequence().rows(sizes, 1) == feature_map().rows(sizes) == 3
    assert feature_map(size=8, width=6).rows(sizes, 4) == 3 * 6 * 8 * 8


def test_features_are_as_many_as_a_recurrence_has_units_or_the_wider_side():
    narrow, wide = ("batch", "time", 8), ("batch", "time", 20)
    assert shaped(into=narrow, out=wide).features_width == shaped(into=wide, out=narrow).features_width == 20
    assert replace(sequence(), recurrent_units=5).features_width == 5


def test_an_affine_map_computes_in_the_dtype_of_what_it_is_given():
    one = Affine(torch.randn(3, 4), torch.randn(3))
    assert one.of(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert one.to(torch.bfloat16).bias_O.dtype == torch.bfloat16


@pytest.mark.parametrize("count", [1, 2, 4])
def test_heads_of_keys_and_values_are_counted_before_they_were_repeated(count):
    def repeated(seed: int) -> Affine:
        weight_GKI, bias_GK = affine(4 * count, 16, seed).weight_OI.view(count, 4, 16), torch.randn(count, 4)
        times = 4 // count
        return Affine(
            weight_GKI.repeat_interleave(times, 0).flatten(0, 1), bias_GK.repeat_interleave(times, 0).flatten()
        )

    assert replace(attention(), key=repeated(1), value=repeated(2)).kv_heads == count
