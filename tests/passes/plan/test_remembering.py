"""Parts that carry a memory of fixed size already stay, where a recurrence is asked for and others grow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from tests.models import seeded, spread, token_batches, tokens
from tests.remembering_guides import Both, DeltaNet, DeltaNetOfFeatures, Remembering, Scanned, StateSpace, remembering

DATA = token_batches(2)


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        (DeltaNet, "gated_delta_rule"),
        (DeltaNetOfFeatures, "gated_delta_rule"),
        (StateSpace, "state_space"),
        (Scanned, "selective_scan"),
    ],
)
def test_attentions_are_replaced_and_memories_stay(memory: type[nn.Module], told: str):
    plan = thesean.plan(remembering(memory), "rnn", data=DATA)
    kept = [p for p in plan.parts if told in p.operators]
    assert [p.kept for p in kept] == [True]
    (replaced,) = plan.replaced
    assert "attention" in replaced.operators
    (note,) = [n for n in plan.notes if "memory of fixed size" in n]
    assert note.startswith(kept[0].path)
    assert note.endswith("parts= replaces it too")
    (state,) = [n for n in plan.notes if n.startswith("state: ")]
    assert state.endswith(f"at any length, beside the memory of {kept[0].path}")


def test_of_two_branches_the_attention_is_replaced(tmp_path):
    guide = spread(seeded(Remembering, Both()))
    converted = thesean.compile(guide, "rnn", data=DATA, recipe="fast", progress=False)
    (part,) = converted.plan.replaced
    assert [path.split(".")[3] for path in part.replaces] == ["attention"]
    (state,) = [n for n in converted.plan.notes if n.startswith("state: ")]
    assert state.endswith(f"beside the memory of {part.path}")
    again = thesean.compile(guide, plan=converted.plan, data=DATA, recipe="fast", progress=False)
    ids = tokens(2, 12, seed=1)
    assert torch.equal(again.module(ids), converted.module(ids))
    assert len(thesean.plan(guide, "rnn", data=DATA, parts=["layers.0.mixer.memory"]).replaced) == 1


def test_who_names_a_part_has_it_replaced():
    plan = thesean.plan(remembering(), "rnn", data=DATA, parts=["layers.0.mixer", "layers.1.mixer"])
    assert len(plan.replaced) == 2
    plan = thesean.plan(remembering(), {"layers.0.before*": "rnn"}, data=DATA)
    assert ["gated_delta_rule" in p.operators for p in plan.replaced] == [True]


def test_where_there_is_nothing_else_they_are_what_is_replaced():
    guide = spread(seeded(Remembering, DeltaNet(), DeltaNet()))
    plan = thesean.plan(guide, "rnn", data=DATA)
    assert len(plan.replaced) == 2
    (told,) = [n for n in plan.notes if "memory of fixed size" in n]
    assert told.endswith("the guide itself decodes with it (thesean.export_guide)")


def test_a_guide_that_is_kept_whole_is_told_nothing():
    assert not any("memory of fixed size" in n for n in thesean.plan(remembering(), "keep", data=DATA).notes)


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
