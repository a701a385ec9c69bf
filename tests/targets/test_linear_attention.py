"""B batch, T time, D width, H heads, C width of a head"""

from __future__ import annotations

import pytest
import torch

from tests.targets.build import build
from thesean.errors import TargetMismatchError
from thesean.targets import Affine, AttentionFacts
from thesean.targets.shared.heads import MEMORY, SHARPNESS


def quadratic(facts: AttentionFacts, x_BTD: torch.Tensor, mask_TT: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """The target as a weighted mean over tokens, from the guide's weights alone: weights phi(q).phi(k) * mask."""

    def heads(affine: Affine) -> torch.Tensor:
        return (x_BTD @ affine.weight_OI.T + affine.bias_O).unflatten(-1, (facts.heads, -1)).transpose(1, 2)

    def phi(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([gain * z, -gain * z], -1).softmax(-1)

    weights = phi(heads(facts.query)) @ phi(heads(facts.key)).mT * mask_TT
    mean = weights @ heads(facts.value) / weights.sum(-1, keepdim=True)
    return mean.transpose(1, 2).flatten(2) @ facts.output.weight_OI.T + facts.output.bias_O


def decay_mask(heads: int, time: int) -> torch.Tensor:
    """exp(-(t - s) / memory) for s <= t, one matrix a head: what the gates say before any training."""
    tokens_H = MEMORY[0] * (MEMORY[1] / MEMORY[0]) ** (torch.arange(heads) / (heads - 1))
    rate_H11 = 1 / tokens_H.view(-1, 1, 1)
    distance_TT = torch.arange(time).view(-1, 1) - torch.arange(time)
    return torch.exp(-rate_H11 * distance_TT).tril()


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_a_copied_module_attends_with_the_guides_weights(mixing, sequence_part, attention_facts):
    facts = attention_facts()
    part = sequence_part(mixing, attention=facts)
    module = build("linear-attention", part).eval()
    assert module.copy_from(part) == ("query", "key", "value", "output")
    x_BTD = torch.randn(2, 11, 16)
    mask = decay_mask(4, 11) if mixing == "causal" else torch.ones(11, 11)
    y_BTD = module(x_BTD)[0] if mixing == "causal" else module(x_BTD)
    torch.testing.assert_close(y_BTD, quadratic(facts, x_BTD, mask, gain=SHARPNESS), rtol=1e-4, atol=1e-5)


def test_a_guide_with_another_scale_gets_it_in_the_feature_maps(sequence_part, attention_facts):
    facts = attention_facts(scale=2.0)  # 4 / sqrt(C): 2 for queries, 2 for keys
    part = sequence_part("bidirectional", attention=facts)
    module = build("linear-attention", part).eval()
    module.copy_from(part)
    x_BTD = torch.randn(2, 5, 16)
    expected = quadratic(facts, x_BTD, torch.ones(5, 5), gain=2.0 * SHARPNESS)
    torch.testing.assert_close(module(x_BTD), expected, rtol=1e-4, atol=1e-5)


def test_learnt_feature_maps_act_on_each_heads_queries(sequence_part, attention_facts):
    module = build("linear-attention", sequence_part(attention=attention_facts()))
    with torch.no_grad():
        module.map_query_HCC.normal_()
    x_BTD = torch.randn(2, 3, 16)
    query_BTHC = module.query(x_BTD).unflatten(-1, (4, 4))
    mapped = torch.einsum("hij,bthj->bthi", module.map_query_HCC, query_BTHC)
    expected = torch.cat([mapped, -mapped], -1).softmax(-1)
    torch.testing.assert_close(module.phi(x_BTD, x_BTD)[0], expected)


def test_heads_of_another_width_than_the_parts_are_copied_too(sequence_part, attention_facts):
    facts = attention_facts(heads=2, head_width=5)
    part = sequence_part(attention=facts)
    module = build("linear-attention", part)
    assert module.initial_state(torch.zeros(3, 1, 16)).shape == (3, 2, 10, 6)
    assert module.copy_from(part) == ("query", "key", "value", "output")


def test_without_attention_heads_are_one_per_32_features(sequence_part):
    heads = [build("linear-attention", sequence_part(width_in=width)).heads for width in (16, 64, 96, 100)]
    assert heads == [1, 2, 3, 2]
    state = build("linear-attention", sequence_part(), heads=8).initial_state(torch.zeros(3, 1, 16))
    assert state.shape == (3, 8, 4, 3)


def test_other_heads_than_the_guides_copy_nothing(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    module = build("linear-attention", part, heads=2)
    assert module.copy_from(part) == ()


def test_heads_that_do_not_divide_the_width_are_refused(sequence_part):
    with pytest.raises(TargetMismatchError, match=r"layers.0: .* found width 16 with 3 heads .* Set heads=1"):
        build("linear-attention", sequence_part(), heads=3)


def test_the_output_stays_a_mean_of_values_over_a_long_sequence(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    module = build("linear-attention", part).eval()
    module.copy_from(part)
    x_BTD = torch.randn(1, 2000, 16)
    features, _ = module.features(x_BTD)
    values = module.value(x_BTD)
    assert features.amax() <= values.amax()
    assert features.amin() >= values.amin()


def grouped(facts: AttentionFacts, count: int) -> AttentionFacts:
    """The same with keys and values of `count` heads, repeated."""
    repeats = facts.heads // count

    def repeated(affine: Affine) -> Affine:
        by_head = (rows.unflatten(0, (facts.heads, -1)) for rows in affine)
        return Affine(*(rows[::repeats].repeat_interleave(repeats, 0).flatten(0, 1) for rows in by_head))

    return AttentionFacts(
        heads=facts.heads, scale=facts.scale, query=facts.query, key=repeated(facts.key), value=repeated(facts.value),
        output=facts.output,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 4])
def test_heads_of_keys_and_values_are_counted_without_their_repetitions(count, attention_facts):
    facts = grouped(attention_facts(), count)
    assert facts.kv_heads == count
    for affine, taken in zip((facts.key, facts.value), facts.grouped(count), strict=True):
        for rows, own in zip(affine, taken, strict=True):
            repeated = own.unflatten(0, (count, 4)).repeat_interleave(4 // count, 0).flatten(0, 1)
            torch.testing.assert_close(repeated, rows, rtol=0, atol=0)


def test_a_bias_of_its_own_makes_a_head_of_its_own(attention_facts):
    facts = grouped(attention_facts(), 2)
    facts.value.bias_O[5] += 1
    assert facts.kv_heads == 4


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_a_guide_with_groups_gets_a_state_a_group(mixing, sequence_part, attention_facts):
    facts = grouped(attention_facts(), 2)
    part = sequence_part(mixing, attention=facts)
    module = build("linear-attention", part, memory=(5.0, 5.0)).eval()
    assert module.copy_from(part) == ("query", "key", "value", "output")
    assert module.key.weight.shape == module.value.weight.shape == (8, 16)
    x_BTD = torch.randn(2, 11, 16)
    if mixing == "causal":
        assert module.initial_state(x_BTD).shape == (2, 2, 8, 5)
        distance_TT = torch.arange(11).view(-1, 1) - torch.arange(11)
        mask, y_BTD = torch.exp(-distance_TT / 5.0).tril(), module(x_BTD)[0]
    else:
        mask, y_BTD = torch.ones(11, 11), module(x_BTD)
    torch.testing.assert_close(y_BTD, quadratic(facts, x_BTD, mask, gain=SHARPNESS), rtol=1e-4, atol=1e-5)


def test_groups_can_be_split_into_states_of_their_own(sequence_part, attention_facts):
    facts = grouped(attention_facts(), 2)
    part = sequence_part(attention=facts)
    whole, split = (build("linear-attention", part, memory=(5.0, 5.0), kv_heads=n).eval() for n in (2, 4))
    for module in (whole, split):
        assert module.copy_from(part) == ("query", "key", "value", "output")
    assert split.initial_state(torch.zeros(3, 1, 16)).shape == (3, 4, 8, 5)
    x_BTD = torch.randn(2, 11, 16)
    torch.testing.assert_close(split(x_BTD)[0], whole(x_BTD)[0], rtol=1e-4, atol=1e-5)


def test_fewer_states_than_the_guides_groups_copy_neither_keys_nor_values(sequence_part, attention_facts):
    part = sequence_part(attention=grouped(attention_facts(), 2))
    assert build("linear-attention", part, kv_heads=1).copy_from(part) == ("query", "output")


def test_a_single_state_remembers_the_middle_of_the_memories(sequence_part, attention_facts):
    part = sequence_part(attention=grouped(attention_facts(), 1))
    decay = build("linear-attention", part, memory=(4.0, 25.0)).decay
    torch.testing.assert_close(torch.nn.functional.softplus(decay.bias), torch.tensor([1 / 10.0]))
