"""The family that a part gets, and the window that its attention asks for.

B batch, T time, D width
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import thesean
from tests import models
from tests.targets.build import build
from thesean.errors import TargetMismatchError
from thesean.targets import Affine, AttentionFacts, PartFacts
from thesean.targets.rnn import RnnOptions, decide
from thesean.targets.shared.distance_bias import DistanceBias, Reach
from thesean.targets.shared.family import Place


def test_parts_with_attention_become_linear_attention_on_its_projections(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    module = build("rnn", part)
    assert module.family == "linear-attention"
    assert module.copy_from(part) == ("query", "key", "value", "output")


def test_parts_without_attention_become_gated_linear_recurrences(sequence_part):
    assert build("rnn", sequence_part()).family == "mingru"
    assert build("rnn", sequence_part("bidirectional")).family == "mingru"


def test_bidirectional_attention_stays_bidirectional(sequence_part, attention_facts):
    module = build("rnn", sequence_part("bidirectional", attention=attention_facts()))
    assert module.family == "linear-attention"
    assert not module.stateful


def test_width_reaches_the_family_that_was_picked(sequence_part):
    assert build("rnn", sequence_part(), width=24).last.in_features == 24


def decided(part: PartFacts, length: int = 256, **options: Any) -> dict[str, Any]:
    x = torch.randn(3, length, part.width_in, generator=torch.Generator().manual_seed(0))
    return decide([Place(part, lambda: (x, None))], RnnOptions(**options))


def local(facts: AttentionFacts, slope: float, scale: float = 1.0) -> AttentionFacts:
    reach = Reach(torch.zeros(facts.heads, 1), torch.full((facts.heads,), -slope))
    return dataclasses.replace(facts, bias=DistanceBias(reach, reach), plain=True, scale=scale * facts.scale)


def test_the_window_is_as_long_as_the_attention_looks_back(sequence_part, attention_facts):
    facts = attention_facts()
    found = [decided(sequence_part(attention=local(facts, slope)))["window"] for slope in (1.0, 0.3, 0.05)]
    assert found == sorted(found)
    assert found[0] < found[2] == 64  # a quarter of the rows


def test_a_mean_of_everything_has_no_window(sequence_part, attention_facts):
    assert decided(sequence_part(attention=local(attention_facts(), 0.0, scale=0.0))) == {"window": 0}


def test_what_is_given_or_can_not_be_measured_is_left_alone(sequence_part, attention_facts):
    part = sequence_part(attention=local(attention_facts(), 1.0))
    assert decided(part, window=16) == {}
    assert decided(part, width=32) == {}
    assert decided(part, length=24) == {}
    assert decided(sequence_part()) == {}
    assert decided(sequence_part(attention=attention_facts())) == {}
    assert decided(sequence_part("bidirectional", attention=local(attention_facts(), 1.0))) == {}


def test_sinks_are_kept_where_the_first_tokens_hold_much(sequence_part, attention_facts):
    facts = local(attention_facts(), 0.3)
    part = sequence_part(attention=facts)
    assert decided(part)["sinks"] == 0
    assert decided(part, sinks=2)["sinks"] == 2

    x = torch.randn(3, 256, part.width_in, generator=torch.Generator().manual_seed(0))
    drawn = 8 * torch.linalg.lstsq(facts.key.weight_OI, torch.ones(len(facts.key.bias_O), 1)).solution.mT
    x[:, :1] = drawn  # a key that queries with a positive sum look at from anywhere
    bias = dataclasses.replace(
        facts, bias=None, query=Affine(0.2 * facts.query.weight_OI, torch.ones_like(facts.query.bias_O))
    )
    place = Place(sequence_part(attention=bias), lambda: (x, None))
    assert decide([place], RnnOptions(kept=0))["sinks"] == 4


def looking_at_few(facts: AttentionFacts, sharp: float) -> AttentionFacts:
    """Whose queries look for the same wherever they are, so that what they look at is the same to all of them."""
    same = Affine(0.1 * facts.query.weight_OI, sharp * torch.ones_like(facts.query.bias_O))
    return dataclasses.replace(facts, plain=True, query=same)


def test_an_attention_to_few_tokens_far_back_holds_them(sequence_part, attention_facts):
    facts = attention_facts()
    found = [decided(sequence_part(attention=looking_at_few(facts, sharp))) for sharp in (8.0, 3.0)]
    assert found[0] == {"window": 8, "kept": 8}
    assert found[1]["window"] > 8  # at more of them
    assert decided(sequence_part(attention=looking_at_few(facts, 0.0))) == {"window": 0}  # at all alike
    part = sequence_part(attention=looking_at_few(facts, 8.0))
    assert build("rnn", part, **found[0]).family == "bounded-attention"
    assert build("rnn", part, kept=4).family == "bounded-attention"
    assert build("rnn", part, window=8).family == "linear-attention"
    assert set(decided(part, kept=0)) == {"window", "sinks"}
    assert decided(part, kept=8) == {}


def test_what_can_not_be_kept_is_refused(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    refused_options: list[tuple[PartFacts, dict[str, Any]]] = [
        (sequence_part(), {"kept": 4}),
        (part, {"kept": 4, "sinks": 2}),
        (part, {"kept": 4, "taps": 2}),
        (part, {"kept": 4, "window": 0}),
    ]
    for refused, options in refused_options:
        with pytest.raises(TargetMismatchError, match="kept=4"):
            build("rnn", refused, **options)


def test_the_plan_says_what_was_decided():
    guide = models.llama()
    plan = thesean.plan(guide, "rnn", data=[{"input_ids": models.tokens(4, 64)}])
    assert all({"window", "kept"} == set(part.options) for part in plan.replaced)
    again = thesean.plan(guide, "rnn", data=[{"input_ids": models.tokens(4, 64)}])
    assert plan == again
