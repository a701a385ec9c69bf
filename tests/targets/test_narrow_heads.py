"""B batch, T time, D width, H heads, V width of a head's values"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch

from tests.targets.build import build, started
from tests.tolerances import VALUE, relative_error
from thesean.errors import NumericalError, TargetMismatchError
from thesean.targets import Affine, AttentionFacts, PartFacts, rebuild
from thesean.targets.shared.distance_bias import DistanceBias, Reach
from thesean.targets.shared.head_norm import HeadNorm

BOTH = pytest.mark.parametrize("mixing", ["causal", "bidirectional"])


@pytest.fixture
def plain_part(sequence_part, attention_facts):
    def make(mixing="causal", **facts: Any) -> PartFacts:
        return sequence_part(mixing, attention=dataclasses.replace(attention_facts(**facts), plain=True))

    return make


def guide_of(facts: AttentionFacts, x_BTD: torch.Tensor, causal: bool) -> torch.Tensor:
    """The definition, head by head."""

    def heads(affine: Affine) -> torch.Tensor:
        return (x_BTD @ affine.weight_OI.T + affine.bias_O).unflatten(-1, (facts.heads, -1)).transpose(1, 2)

    scores_BHTT = heads(facts.query) @ heads(facts.key).mT * facts.scale
    if causal:
        scores_BHTT = scores_BHTT.masked_fill(torch.ones(scores_BHTT.shape[-2:]).triu(1).bool(), float("-inf"))
    mixed = (scores_BHTT.softmax(-1) @ heads(facts.value)).transpose(1, 2).flatten(2)
    return mixed @ facts.output.weight_OI.T + facts.output.bias_O


def examples_of(part: PartFacts, count=8, seed=1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert part.attention is not None
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(4, 12, 16, generator=generator) for _ in range(count)]
    return [(x, guide_of(part.attention, x, part.mixing == "causal")) for x in inputs]


def narrowed(part: PartFacts, data=True, target="narrow-heads", **options: Any) -> Any:
    return started(target, part, examples_of(part) if data else (), **options)


def error_of(module: Any, part: PartFacts) -> float:
    ((x, y),) = examples_of(part, 1, seed=9)
    return relative_error(module(x), y)


@BOTH
@pytest.mark.parametrize("settings", [{}, {"heads": 2, "head_width": 5, "scale": 2.0}])
def test_all_heads_are_the_guides_attention(mixing, settings, plain_part):
    part = plain_part(mixing, **settings)
    for data in (False, True):
        assert error_of(narrowed(part, data, ratio=1), part) < VALUE[torch.float32]


@BOTH
def test_silent_heads_are_dropped_without_a_loss(mixing, plain_part):
    part = plain_part(mixing)
    facts = part.attention
    facts.output.weight_OI[:, 0:4] = 0
    facts.output.weight_OI[:, 8:12] = 0
    module = narrowed(part)
    assert module.config()["heads"] == 2
    assert error_of(module, part) < VALUE[torch.float32]
    assert torch.equal(module.query.weight, facts.query.weight_OI.unflatten(0, (4, 4))[[1, 3]].flatten(0, 1))


def test_heads_come_in_pairs_and_one_of_each_is_enough(plain_part):
    part = plain_part()
    facts = part.attention
    for affine in (facts.query, facts.key, facts.value):
        for tensor in affine:
            tensor[8:] = tensor[:8]
    assert error_of(narrowed(part, heads=2), part) < VALUE[torch.float32]
    assert error_of(narrowed(part, data=False, heads=2), part) > 0.1


def test_data_finds_the_head_that_matters_where_weights_mislead(plain_part):
    """A head whose value is the same at every token has heavy weights and nothing to say that a bias can't."""
    part = plain_part()
    facts = part.attention
    facts.value.weight_OI[:4] = 0
    facts.value.bias_O[:4] = 50
    facts.output.weight_OI[:, :4] *= 50
    module = narrowed(part, heads=3)
    assert error_of(module, part) < VALUE[torch.float32]
    assert torch.equal(module.value.bias, facts.value.bias_O[4:])


def test_more_heads_lose_less(plain_part):
    part = plain_part(heads=8, head_width=2)
    errors = [error_of(narrowed(part, heads=k), part) for k in (1, 3, 5, 8)]
    assert all(more < fewer for fewer, more in itertools.pairwise(errors))


def test_data_beats_weight_norms(plain_part):
    part = plain_part(heads=8, head_width=2)
    assert error_of(narrowed(part), part) < error_of(narrowed(part, data=False), part)


def test_a_causal_one_sees_no_later_token(plain_part):
    module = narrowed(plain_part("causal"))
    x = torch.randn(1, 6, 16)
    y = module(x)
    x[:, 4:] += 1
    assert torch.equal(module(x)[:, :4], y[:, :4])


@BOTH
def test_the_config_round_trips(mixing, plain_part):
    module = narrowed(plain_part(mixing))
    again = rebuild("narrow-heads", json.loads(json.dumps(module.config()))).eval()
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)
    assert not module.stateful


def test_gradients_are_right(plain_part):
    module = narrowed(plain_part(), heads=1).double()
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_flops_count_projections_and_scores(plain_part):
    part = plain_part()
    module = narrowed(part)
    # q, k, v, o of 2 heads of 4: 4 * 16 * 8 weights; scores and their sum: 7 tokens * 2 heads * 8
    assert module.flops(part, {"batch": 3, "time": 7}) == 2 * 21 * (4 * 16 * 8 + 7 * 2 * 8)


def test_narrow_takes_heads_where_there_is_no_mlp(plain_part):
    part = plain_part()
    assert narrowed(part, target="narrow").config() == narrowed(part).config()
    assert narrowed(part, target="narrow", heads=3).config()["heads"] == 3
    with pytest.raises(TargetMismatchError, match=r"found an attention, and the option 'width'"):
        build("narrow", part, width=3)


@pytest.mark.parametrize(("options", "heads"), [({}, 2), ({"ratio": 0.75}, 3), ({"heads": 1}, 1), ({"ratio": 0.01}, 1)])
def test_heads_are_asked_for_or_half_the_guides(options, heads, plain_part):
    assert build("narrow-heads", plain_part(), **options).config()["heads"] == heads


def test_an_attention_with_more_to_it_is_refused(sequence_part, attention_facts):
    for target in ("narrow", "narrow-heads"):
        with pytest.raises(
            TargetMismatchError, match=r"found an attention that softmax\(q k' scale \+ bias\) v alone does not"
        ):
            build(target, sequence_part(attention=attention_facts()))


def known(mixing: str) -> dict[str, Any]:
    """What a guide may add to its scores and norm its queries and keys with."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) + 0.5

    norms = tuple(HeadNorm(drawn(4, 4), eps, drawn(4, 4)) for eps in (1e-6, 1e-2))
    reaches = (Reach(drawn(4, 3), -drawn(4)), Reach(drawn(4, 2), torch.zeros(4)))
    return {"norms": norms, "bias": DistanceBias(*reaches)}


@BOTH
@pytest.mark.parametrize("heads", [4, 2])
def test_a_bias_of_distance_and_norms_of_each_head_stay_with_their_heads(mixing, heads, plain_part):
    part = plain_part(mixing)
    facts = dataclasses.replace(part.attention, **known(mixing))
    facts.output.weight_OI[:, 0:4] = 0
    facts.output.weight_OI[:, 8:12] = 0
    part = dataclasses.replace(part, attention=facts)
    module = build("narrow-heads", part, heads=heads).eval()
    module.copy_from(part)
    x = torch.randn(2, 9, 16)
    wanted = facts.output.of(facts.mixed_values(x, mixing == "causal"))
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    again = rebuild("narrow-heads", json.loads(json.dumps(module.config()))).eval()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))


def test_the_facts_with_a_bias_are_the_definition(plain_part):
    facts = dataclasses.replace(plain_part().attention, bias=known("causal")["bias"])
    x_BTD = torch.randn(2, 7, 16)
    query, key, value = (
        affine.of(x_BTD).unflatten(-1, (4, -1)).transpose(1, 2) for affine in (facts.query, facts.key, facts.value)
    )
    scores = query @ key.mT * facts.scale + facts.bias.matrix(7, x_BTD)
    for causal in (True, False):
        hidden = torch.ones(7, 7).triu(1).bool() & causal
        mixed = (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(facts.mixed_values(x_BTD, causal), mixed, rtol=1e-4, atol=1e-5)


def test_heads_that_are_normed_together_are_refused(plain_part):
    part = plain_part()
    norms = (HeadNorm(torch.ones(4, 4), 1e-6, None, True),) * 2
    part = dataclasses.replace(part, attention=dataclasses.replace(part.attention, norms=norms))
    for target in ("narrow", "narrow-heads"):
        with pytest.raises(TargetMismatchError, match="normed over all heads at once"):
            build(target, part)


def test_too_many_heads_and_no_attention_are_refused(sequence_part, plain_part):
    with pytest.raises(TargetMismatchError, match=r"found heads 5\. Lower heads"):
        build("narrow-heads", plain_part(), heads=5)
    with pytest.raises(TargetMismatchError, match="found a part without attention"):
        build("narrow-heads", sequence_part())


def test_another_attention_than_the_modules_copies_nothing(plain_part):
    module = build("narrow-heads", plain_part())
    assert module.copy_from(plain_part(head_width=3)) == ()
    assert module.copy_from(plain_part(heads=1)) == ()


def test_not_a_number_in_the_data_names_the_part(plain_part):
    part = plain_part()
    x = torch.full((1, 4, 16), float("nan"))
    with pytest.raises(NumericalError, match=r"^layers.0: can't choose heads, activations are not finite"):
        build("narrow-heads", part).prepare(part, [(x, x)])


def test_without_data_heads_stay_whose_values_reach_the_output_most(plain_part):
    """By the product of both norms: a head whose values are large and go nowhere is none."""
    part = plain_part(heads=4)
    facts = part.attention
    assert facts is not None
    value_HVD = facts.value.weight_OI.unflatten(0, (4, -1)).clone()
    output_OHV = facts.output.weight_OI.unflatten(1, (4, -1)).clone()
    for head, (value, output) in enumerate([(100.0, 1e-3), (1.0, 1.0), (1e-3, 100.0), (1.0, 1.0)]):
        value_HVD[head] *= value / value_HVD[head].norm()
        output_OHV[:, head] *= output / output_OHV[:, head].norm()
    made = dataclasses.replace(
        facts,
        value=facts.value._replace(weight_OI=value_HVD.flatten(0, 1)),
        output=facts.output._replace(weight_OI=output_OHV.flatten(1)),
    )
    module = narrowed(dataclasses.replace(part, attention=made), data=False, heads=2)
    kept = module.value.weight.unflatten(0, (2, -1))
    torch.testing.assert_close(kept, value_HVD[[1, 3]])
