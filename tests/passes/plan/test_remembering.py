"""Parts that carry a memory of fixed size already stay, where a recurrence is asked for and others grow."""

from __future__ import annotations

import pytest
import torch

import thesean
from tests.delta_guides import DeltaNet, Remembering, remembering
from tests.models import seeded, spread, token_batches, tokens

DATA = token_batches(2)


def test_attentions_are_replaced_and_delta_rules_stay():
    plan = thesean.plan(remembering(), "rnn", data=DATA)
    kept = [p for p in plan.parts if "gated_delta_rule" in p.operators]
    assert [p.kept for p in kept] == [True]
    (replaced,) = plan.replaced
    assert "attention" in replaced.operators
    (told,) = [n for n in plan.notes if "memory of fixed size" in n]
    assert told.startswith(kept[0].path)
    assert told.endswith("parts= replaces it too")
    (state,) = [n for n in plan.notes if n.startswith("state: ")]
    assert state.endswith(f"at any length, beside the memory of {kept[0].path}")


def test_who_names_a_part_has_it_replaced():
    plan = thesean.plan(remembering(), "rnn", data=DATA, parts=["layers.0.mixer", "layers.1.mixer"])
    assert len(plan.replaced) == 2
    plan = thesean.plan(remembering(), {"layers.0.before*": "rnn"}, data=DATA)
    assert ["gated_delta_rule" in p.operators for p in plan.replaced] == [True]


def test_where_there_is_nothing_else_they_are_what_is_replaced():
    guide = spread(seeded(Remembering, DeltaNet(), DeltaNet()))
    plan = thesean.plan(guide, "rnn", data=DATA)
    assert len(plan.replaced) == 2
    assert not any("memory of fixed size" in n for n in plan.notes)


def test_other_scopes_are_as_they_were():
    plan = thesean.plan(remembering(), "narrow", data=DATA)
    assert len(plan.replaced) == 2  # the MLPs of both layers
    assert not any("memory of fixed size" in n for n in plan.notes)


@pytest.mark.parametrize("training", [{"recipe": "fast"}, {"budget": 20, "loss": thesean.next_token}])
def test_what_stays_is_trained_and_saved_with_the_rest(training, tmp_path):
    converted = thesean.compile(remembering(), "rnn", data=token_batches(4), progress=False, **training)
    converted.save(tmp_path / "kept")
    ids = tokens(2, 100, seed=1)
    assert torch.equal(thesean.load(tmp_path / "kept").module(ids), converted.module(ids))
