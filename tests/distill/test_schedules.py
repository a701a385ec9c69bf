"""Schedules, orders and what parts read, each from the recipe to the report, and through an interruption."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thesean
from tests import models
from tests.distill.test_gate import TARGETS, Cells, windows
from tests.distill.tools import stopped_at
from tests.models import vectors
from thesean.distill.training import Training
from thesean.errors import LostError
from thesean.journal import Interrupted

PARTS = ["cells.0", "cells.1", "cells.2"]


class Each(nn.Module):
    """A map of each token that begins as nothing, and so the same wherever it stands: draws depend on parts before."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)
        for p in self.map.parameters():
            nn.init.zeros_(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x).tanh()


EACH = thesean.Target("each", build=lambda part: Each())


def of_each(recipe: dict[str, Any], target: Any = EACH, **settings: Any) -> thesean.Converted:
    """What became of it, good or not: a map of single tokens makes a poor recurrence."""
    try:
        return convert(recipe, target, **settings)
    except LostError as error:
        return error.converted


def convert(recipe: dict[str, Any] | None = None, target: Any = "mingru", **settings: Any) -> thesean.Converted:
    """30 steps, half of them of alignment; `recipe` is of the alignment, but for what is a recipe's own."""
    own = {k: v for k, v in (recipe or {}).items() if k in thesean.Recipe.model_fields and k != "alignment"}
    aligning = {"share": 0.5, "check_every": 3, **{k: v for k, v in (recipe or {}).items() if k not in own}}
    whole = {"steps": 30, "warmup": 1, **own, "alignment": aligning}
    guide = models.seeded(Cells)
    return thesean.compile(guide, target, data=windows(), recipe=whole, progress=False, **settings)


@functools.cache
def made(**alignment: Any) -> thesean.Converted:
    """The same, once for all tests, which only look at it."""
    return convert(alignment)


@functools.cache
def uninterrupted(number: int) -> thesean.Converted:
    return convert(SETTINGS[number])


def rows(converted: thesean.Converted) -> list[str]:
    return [row.part for row in converted.report.stages]


def test_stages_come_front_to_back_unless_told_otherwise():
    assert rows(made(schedule="sequential")) == PARTS


@pytest.mark.parametrize("schedule", ["progressive", "sequential"])
def test_back_to_front_replaces_the_last_part_first(schedule):
    converted = convert({"schedule": schedule, "order": "back-to-front"})
    assert rows(converted) == PARTS[::-1]
    replaced = [{p.path for p in hybrid.plan.replaced} for hybrid in converted.frontier]
    assert replaced == [set(), {"cells.2"}, {"cells.1", "cells.2"}, set(PARTS)]
    assert converted.report.steps == 30


@pytest.mark.parametrize("order", ["back-to-front", "easiest-first"])
def test_hybrids_on_the_way_are_as_the_report_says(order):
    converted = convert({"schedule": "progressive", "order": order})
    guide, x = models.seeded(Cells), vectors(3, 7, 6, seed=50)
    assert torch.allclose(converted.frontier[0](x)["logits"], guide(x)["logits"], atol=1e-5)
    for hybrid, row in list(zip(converted.frontier[1:], converted.report.stages, strict=True))[:-1]:
        assert hybrid.report.converted["divergence"] == row.divergence
        assert hybrid.report.flops == row.flops
        assert hybrid.report.params == row.params
        held_out = windows()[-1:]
        with torch.no_grad():
            logs = [F.log_softmax(m(held_out[0])["logits"], -1) for m in (hybrid, guide)]
        again = F.kl_div(logs[0].flatten(0, 1), logs[1].flatten(0, 1), log_target=True, reduction="batchmean")
        assert again.item() == pytest.approx(row.divergence, rel=1e-4)


def test_a_part_is_trained_in_the_guide_where_the_parts_before_it_are_the_guides_own():
    """What comes later in this order, but earlier in the network, has no say in it."""
    recipe = {"schedule": "sequential", "order": "back-to-front"}
    first, other = (of_each(recipe, {"cells.0": EACH, "cells.1": t, "cells.2": EACH}) for t in (EACH, "identity"))
    assert first.report.stages[0].after == other.report.stages[0].after
    assert first.report.stages[1].after != other.report.stages[1].after


def test_easiest_first_is_by_the_divergence_of_each_part_alone_and_tells_it():
    converted = of_each({"schedule": "progressive", "order": "easiest-first"})
    (told,) = [n for n in converted.report.notes if n.startswith("easiest first, by the divergence")]
    pairs = [pair.rsplit(" ", 1) for pair in told.partition("in closed form: ")[2].split(", ")]
    assert [path for path, _ in pairs] == rows(converted)
    measured = [float(value) for _, value in pairs]
    assert measured == sorted(measured)
    alone = {"schedule": "sequential", "share": 0, "steps": 0}
    for path, value in pairs:
        kept = of_each(alone, keep=[p for p in PARTS if p != path])
        assert kept.report.converted["divergence"] == pytest.approx(float(value), rel=1e-3)


def test_an_order_holds_without_a_step():
    converted = convert({"schedule": "sequential", "order": "back-to-front", "share": 0, "steps": 0})
    assert rows(converted) == PARTS[::-1]
    assert converted.report.steps == 0


@pytest.mark.parametrize("order", ["front-to-back", "back-to-front", "easiest-first"])
def test_a_part_that_costs_too_much_is_kept_in_any_order(order):
    recipe = {"schedule": "progressive", "order": order, "max_drop": 0.3, "retry": {"steps": 4, "warmup": 1}}
    converted = convert(recipe, TARGETS)
    assert [p.target for p in converted.plan] == ["mingru", "keep", "mingru"]
    assert sorted(rows(converted)) == ["cells.0", "cells.2"]
    assert [len(hybrid.plan.replaced) for hybrid in converted.frontier] == [0, 1, 2]
    hybrid, row = converted.frontier[1], converted.report.stages[0]
    assert [p.path for p in hybrid.plan.replaced] == [row.part]
    with torch.no_grad():
        logs = [F.log_softmax(m(windows()[-1])["logits"], -1) for m in (hybrid, models.seeded(Cells))]
    again = F.kl_div(logs[0].flatten(0, 1), logs[1].flatten(0, 1), log_target=True, reduction="batchmean")
    assert again.item() == pytest.approx(row.divergence, rel=1e-4)


def test_stochastic_swapping_trains_by_the_users_loss_and_then_the_whole():
    def loss(output: Any, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output["logits"].flatten(0, 1), batch.sum(-1).gt(0).long().flatten())

    converted = convert({"schedule": "stochastic"}, loss=loss)
    assert [row.measure for row in converted.report.stages] == ["loss"] * 3
    stage, *tuned = converted.report.curves
    assert (stage.phase, stage.steps, tuned[0].phase) == ("align", 15, "fine-tune")
    assert stage.held_out[0][1] == pytest.approx(converted.report.stages[0].before, rel=1e-5)
    assert converted.report.stages[0].after <= converted.report.stages[0].before


def test_stochastic_swapping_without_a_loss_is_by_the_outputs_divergence_and_helps():
    converted = convert({"schedule": "stochastic", "share": 1, "steps": 60, "closed_form": {"enabled": False}})
    row = converted.report.stages[-1]
    assert row.measure == "output kl"
    assert row.stopped_by == "budget"
    assert row.divergence < 0.5 * row.before


def test_swapping_everything_from_the_first_step_on_is_training_the_whole():
    always = {"schedule": "stochastic", "swap_from": 1.0, "share": 1.0}
    joint = {"schedule": "joint", "weights": {"*": 1e-12}, "output": "kl", "share": 1.0, "refit": False}
    found, expected = (convert({**recipe, "steps": 9}) for recipe in (always, joint))
    curves = [c.report.curves[0].losses for c in (found, expected)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.parametrize(
    "alignment", [{"schedule": "stochastic"}, {"schedule": "progressive", "order": "back-to-front"}]
)
def test_a_time_is_shared_with_a_stochastic_schedule_and_with_an_order(monkeypatch, alignment):
    # two seconds from the first step on, however long it took until then
    monkeypatch.setattr(Training, "seconds", property(lambda run: time.monotonic() - run.begun + 2))
    recipe = {"warmup": 1, "alignment": alignment}
    converted = thesean.compile(
        models.seeded(Cells), "mingru", data=windows(), recipe=recipe, budget="1h", progress=False
    )
    assert any(note.startswith("budget ") for note in converted.report.notes)
    assert converted.report.steps > 0


@pytest.mark.parametrize("schedule", ["progressive", "sequential", "independent", "joint"])
def test_what_parts_read_is_a_setting_of_every_schedule(schedule):
    own = "guide" if schedule == "independent" else "hybrid"
    asked = {reads: made(schedule=schedule, inputs=reads) for reads in ("guide", "hybrid", "mixed")}
    asked[None] = made(schedule=schedule)
    losses = {reads: [curve.losses for curve in converted.report.curves] for reads, converted in asked.items()}
    assert models.same_state(asked[None].module, asked[own].module.state_dict())
    assert losses[None] == losses[own]
    assert len({str(found) for found in losses.values()}) == 3


def test_joint_on_the_guides_inputs_is_independent():
    found, expected = made(schedule="joint", inputs="guide"), made(schedule="independent")
    assert models.same_state(found.module, expected.module.state_dict())


def test_mixed_inputs_mean_the_mean_of_both_losses():
    asked = ("guide", "hybrid", "mixed")
    first = {reads: made(schedule="joint", inputs=reads).report.curves[0].losses[0] for reads in asked}
    assert first["mixed"] == pytest.approx((first["guide"] + first["hybrid"]) / 2, rel=1e-5)


SETTINGS: list[dict[str, Any]] = [
    {"schedule": "stochastic"},
    {"schedule": "stochastic", "output": "js", "swap_from": 0.1},
    {"schedule": "progressive", "order": "back-to-front"},
    {"schedule": "sequential", "order": "easiest-first"},
    {"schedule": "progressive", "order": "easiest-first", "max_drop": 0.05, "retry": {"steps": 6, "warmup": 1}},
    {"schedule": "joint", "inputs": "mixed", "measure": {"nmse": 1.0, "cka": 0.5}},
    {"schedule": "progressive", "output": "reverse-kl", "inputs": "guide", "weights": {"cells.1": 2.0}},
]


NAMES = ["-".join(str(v) for v in recipe.values() if isinstance(v, str)) for recipe in SETTINGS]


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=NAMES)
@pytest.mark.parametrize("at", [pytest.param(at, marks=pytest.mark.thorough) for at in (3, 8, 19)] + [13])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, number, at):
    whole, recipe = uninterrupted(number), SETTINGS[number]
    with stopped_at(at), pytest.raises(Interrupted):
        convert(recipe, workdir=tmp_path)
    torch.manual_seed(at)  # another process, in which other things were drawn
    again = convert(recipe, workdir=tmp_path)
    assert any("went on at step" in note for note in again.report.notes)
    assert models.same_state(again.module, whole.module.state_dict())
    assert rows(again) == rows(whole)
    assert [r.after for r in again.report.stages] == [r.after for r in whole.report.stages]


@pytest.mark.parametrize("schedule", ["progressive", "sequential", "joint"])
def test_a_stage_that_leaves_the_hybrid_worse_than_it_was_solved_keeps_what_was_solved(schedule):
    settings = {"schedule": schedule, "ceiling": 0.0, "refit": False, "fine_tuning": {"share": 0.0}}
    solved = convert({**settings, "share": 0.0}).report.converted["divergence"]
    # exits come nearer by a measure that is blind to their size
    trained = convert({**settings, "share": 1.0, "measure": "cka", "learning_rate": 0.05})
    assert any("alignment did not help: kept what the closed form gave" in note for note in trained.report.notes)
    assert solved is not None
    assert trained.report.converted["divergence"] is not None
    assert trained.report.converted["divergence"] <= solved
