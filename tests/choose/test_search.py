"""target="auto" end to end on small guides; never a time, always the structure."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import thesean
from tests import hand_written, models
from tests.models import same_state, state_of, token_batches, tokens
from thesean import Target
from thesean.choose.quality import Effort, Prober
from thesean.errors import PlanError, UnknownNameError

CANDIDATES = ["keep", "identity", "gru"]


@pytest.fixture(autouse=True)
def _little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps a probe, and as few turns as a median takes: no test here looks at how good or how fast a choice is.
    The command line's take the usual steps.
    """
    few = partial(Prober, effort=Effort(part_steps=3, whole_steps=5))
    monkeypatch.setattr("thesean.choose.choose_plan.Prober", few)
    for module in ("latency", "parts"):
        monkeypatch.setattr(f"thesean.deploy.timing.{module}._SECONDS", 0.0)


def chosen(constraints, candidates=CANDIDATES, layers=2, guide=None, **settings):
    return thesean.plan(
        models.gpt2(layers) if guide is None else guide,
        "auto",
        data=token_batches(10),
        constraints=constraints,
        candidates=candidates,
        progress=False,
        **settings,
    )


def test_a_bound_on_parameters_holds_and_the_probes_are_told():
    guide = models.gpt2(2)
    total = sum(p.numel() for p in guide.parameters())
    plan = chosen({"params": total - 3000})
    assert plan.new_params <= total - 3000
    assert {p.path for p in plan} == {c.path for c in plan.candidates}
    by_part = {p.path: [c for c in plan.candidates if c.path == p.path] for p in plan}
    assert all(sum(c.chosen for c in rows) == 1 for rows in by_part.values())
    assert all(c.divergence == 0 for c in plan.candidates if c.target == "keep")
    assert all(c.divergence > 0 for c in plan.candidates if c.target == "identity")
    assert any("chosen for at most" in note for note in plan.notes)
    assert [c.target for c in by_part["transformer.h.0.mlp"]] == ["keep", "identity"]  # a gru has no use for an MLP


@pytest.mark.thorough
def test_the_least_loss_is_chosen_where_one_part_may_go():
    """Without finalists to differ, the choice is the smallest divergence of those that fit."""
    guide = models.gpt2(2)
    total = sum(p.numel() for p in guide.parameters())
    plan = chosen({"params": total - 2128}, ["keep", "identity"])  # one MLP's worth
    dropped = [p.path for p in plan.replaced]
    alone = {c.path: c.divergence for c in plan.candidates if c.target == "identity"}
    assert sum(p.params for p in plan.replaced) >= 2128
    best = min(d for path, d in alone.items() if path.endswith("mlp"))
    assert any(alone[path] <= best for path in dropped) or len(dropped) > 1


@pytest.mark.thorough
def test_a_budget_that_the_guide_meets_leaves_it_alone():
    plan = chosen({"params": 10**9}, layers=1)
    assert plan.replaced == ()


@pytest.mark.thorough
def test_a_budget_that_nothing_meets_is_told_with_the_nearest_plan():
    plan = chosen({"params": 10}, layers=1)
    assert any("can't be met" in note for note in plan.notes)
    assert {p.target for p in plan} == {"identity"}


@pytest.mark.thorough
def test_a_latency_is_measured_and_told():
    guide = models.seeded(models.Tabled)
    before = state_of(guide)
    plan = thesean.plan(
        guide, "auto", data=token_batches(10), constraints={"speedup": 1.2, "context": 16}, granularity="block",
        candidates=["keep", "identity"], progress=False,
    )  # fmt: skip
    assert any(note.startswith("measured ") and "prefill at 16 tokens" in note for note in plan.notes)
    assert len(plan.candidates) == 4
    assert all(c.added_ms is not None for c in plan.candidates)
    assert same_state(guide, before)


@pytest.mark.thorough
def test_single_steps_need_every_attention_replaced():
    plan = chosen({"speedup": 1.1, "context": 16, "kind": "token"}, ["keep", "gru"], layers=2)
    assert [p.target for p in plan] == ["gru", "keep"] * 2  # an MLP takes one token at a time as it is


@pytest.mark.thorough
def test_a_dropped_attention_takes_single_steps_as_well():
    plan = chosen({"speedup": 1.1, "context": 16, "kind": "token"}, layers=1)
    assert [(c.target, c.added_ms is None) for c in plan.candidates if c.path.endswith("attn")] == [
        ("identity", False), ("gru", False),
    ]  # fmt: skip


@pytest.mark.thorough
def test_kept_parts_stay():
    plan = chosen({"params": 10}, keep=["*.h.1.*"])
    assert [p.path for p in plan if p.kept] == ["transformer.h.1.attn", "transformer.h.1.mlp"]


@pytest.mark.thorough
def test_a_chosen_plan_survives_yaml_and_converts():
    plan = chosen({"params": 6000})
    again = thesean.Plan.from_yaml(plan.to_yaml())
    assert again == plan
    converted = thesean.compile(models.gpt2(2), plan=again, data=token_batches(10), recipe={"steps": 2}, progress=False)
    assert converted.report.params == plan.new_params <= 6000
    assert torch.isfinite(converted(tokens()).logits).all()


@pytest.mark.thorough
def test_compile_chooses_as_well():
    converted = thesean.compile(
        models.gpt2(2), "auto", data=token_batches(10), constraints={"params": 5000}, candidates=CANDIDATES,
        recipe={"steps": 2}, progress=False,
    )  # fmt: skip
    assert converted.report.params <= 5000
    assert any("chosen for" in n for n in converted.plan.notes)


@pytest.mark.thorough
def test_the_same_seed_chooses_the_same():
    first, second = (chosen({"params": 3500}, layers=1, seed=1) for _ in range(2))
    assert first == second


@pytest.mark.thorough
def test_feature_maps_have_candidates_too():
    data = models.labelled(10, 4, 1, 8, 8)
    guide = models.resnet()
    total = sum(p.numel() for p in guide.parameters())
    plan = thesean.plan(
        guide, "auto", data=data, constraints={"params": total - 400}, candidates=["keep", "identity", "mlp"],
        granularity="block", progress=False,
    )  # fmt: skip
    assert plan.new_params <= total - 400
    shaping = [p for p in plan if p.input_shape != p.output_shape]
    assert shaping
    assert all(p.target != "identity" for p in shaping)


def test_wrong_words_are_refused_before_anything_is_probed():
    guide = models.seeded(hand_written.Tied)
    with pytest.raises(PlanError, match="needs a budget"):
        chosen(None, guide=guide)
    with pytest.raises(UnknownNameError, match="unknown target 'gruu'; did you mean 'gru'"):
        chosen({"params": 10}, ["keep", "gruu"], guide=guide)
    with pytest.raises(PlanError, match="expected at least one target, found none"):
        chosen({"params": 10}, [], guide=guide)
    with pytest.raises(PlanError, match="no candidate fits any part"):
        chosen({"params": 10}, ["gru"], parts=["*.mlp"], guide=guide)
    with pytest.raises(PlanError, match="belong to target='auto'"):
        thesean.plan(guide, "gru", data=token_batches(), constraints={"params": 10})
    with pytest.raises(PlanError, match="keep: no part matches"):
        chosen({"params": 10}, keep=["*.9.*"], guide=guide)


@pytest.mark.thorough
def test_parts_that_share_weights_are_counted_on_the_whole():
    """One block three times: dropping it once frees nothing, so that a sum over parts is wrong."""
    guide = hand_written.Looped().eval()
    total = sum(p.numel() for p in guide.parameters())
    data = [models.vectors(3, 12, 16, seed=k) for k in range(10)]
    plan = thesean.plan(
        guide, "auto", data=data, constraints={"params": total - 200}, candidates=["keep", "identity"], progress=False
    )
    unmet = any(note.startswith("warning: the constraints can't be met") for note in plan.notes)
    assert unmet or plan.new_params <= total - 200


@pytest.mark.thorough
def test_all_bounds_hold_or_none_is_said_to_be_met():
    guide = models.seeded(models.Tabled)
    plan = chosen({"speedup": 0.5, "params": 10, "context": 16}, ["keep", "identity"], guide=guide)
    assert plan.notes[0].startswith("warning: the constraints can't be met")


@pytest.mark.thorough
def test_compiling_for_a_budget_that_can_not_be_met_warns():
    with pytest.warns(UserWarning, match="the constraints can't be met"):
        thesean.compile(
            models.gpt2(1), "auto", data=token_batches(10), constraints={"params": 10}, candidates="identity",
            recipe={"steps": 2}, progress=False,
        )  # fmt: skip


@pytest.mark.thorough
def test_single_steps_without_a_candidate_for_them_are_refused_at_once():
    with pytest.raises(PlanError, match=r"needs a candidate that carries a state.*h\.0\.attn.*Add 'rnn'"):
        chosen({"speedup": 1.1, "context": 16, "kind": "token"}, ["keep", Target("narrow", ratio=0.5)], layers=1)
