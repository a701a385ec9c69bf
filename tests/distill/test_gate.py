"""What a part may cost: it is tried again by another recipe, then kept, and everything that comes after says so."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.distill.tools import drafted, stopped_at
from tests.models import vectors
from thesean.errors import LostError
from thesean.journal import Interrupted
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.without import STALE, without
from thesean.recipe import Recipe

UNTRAINED = {"steps": 0, "closed_form": {"enabled": False}, "alignment": {"schedule": "none"}}
SOLVED = {"steps": 0, "alignment": {"schedule": "none"}}


class Cells(nn.Module):
    """A stem, three recurrent blocks and a head: x_BTD -> logits_BTV."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.cells = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(x)
        for cell in self.cells:
            x = x + cell(x)[0]
        return {"logits": 3 * self.head(x)}


class Wild(nn.Module):
    """Nothing that could be solved or trained: what it adds is large and wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -20 * x


WILD = thesean.Target("wild", build=lambda part: Wild())
TARGETS = {"cells.0": "mingru", "cells.1": WILD, "cells.2": "mingru"}


def windows() -> list[torch.Tensor]:
    return [vectors(4, 7, 6, seed=k) for k in range(9)]


def convert(target: Any = TARGETS, **settings: Any) -> thesean.Converted:
    recipe = {"max_drop": 0.3, **SOLVED, **settings.pop("recipe", {})}
    guide = models.seeded(Cells)
    return thesean.compile(guide, target, data=windows(), recipe=recipe, progress=False, **settings)


def test_a_part_that_costs_too_much_is_kept_and_the_rest_is_converted():
    converted = convert()
    assert [p.target for p in converted.plan] == ["mingru", "keep", "mingru"]
    for told in (converted.plan.notes, converted.report.notes):
        assert any(n.startswith("cells.1: kept as the guide's: its divergence rose by") for n in told)
    assert [row.part for row in converted.report.stages] == ["cells.0", "cells.2"]
    assert all(row.of == 2 for row in converted.report.stages)
    asked = convert({**TARGETS, "cells.1": "keep"})
    assert models.same_state(converted.module, asked.module.state_dict())
    assert converted.plan.new_params == asked.plan.new_params == asked.report.params == converted.report.params
    assert converted.plan.new_flops == asked.plan.new_flops


@pytest.mark.parametrize("schedule", ["progressive", "sequential", "independent", "joint"])
def test_every_schedule_gives_the_part_up(schedule):
    recipe = {"steps": 30, "warmup": 1, "alignment": {"schedule": schedule, "share": 0.5, "check_every": 2}}
    converted = convert(recipe={**recipe, "retry": {"steps": 4, "warmup": 1}})
    assert [p.target for p in converted.plan] == ["mingru", "keep", "mingru"]
    assert converted.report.steps == 30
    x = windows()[0]
    assert converted.report.converted["divergence"] <= 0.6
    assert torch.isfinite(converted(x)["logits"]).all()


def test_the_frontier_saving_and_exporting_hold_without_the_part(tmp_path: Path):
    converted = convert()
    x = vectors(2, 7, 6, seed=100)
    assert [len(c.plan.replaced) for c in converted.frontier] == [0, 1, 2]
    guide = models.seeded(Cells)
    assert torch.allclose(converted.frontier[0](x)["logits"], guide(x)["logits"], atol=1e-5)
    assert converted.frontier[1].report.converted["divergence"] == converted.report.stages[0].divergence
    loaded = thesean.load(converted.save(tmp_path / "saved"))
    assert loaded.plan.notes == converted.plan.notes
    assert torch.equal(loaded(x)["logits"], converted(x)["logits"])
    assert converted.export(tmp_path / "model.onnx")


def test_a_retry_that_helps_is_taken_and_told():
    solved = convert("mingru", recipe={"max_drop": None}).report.stages
    after = [row.divergence for row in solved]
    costs = [b - a for a, b in zip([0.0, *after], after, strict=False)]
    recipe = {**UNTRAINED, "max_drop": max(costs) * 1.001, "retry": SOLVED}
    converted = convert("mingru", recipe=recipe)
    assert [p.target for p in converted.plan] == ["mingru"] * 3
    taken = [n for n in converted.report.notes if n.endswith("which was taken")]
    assert taken
    assert all("more than max_drop" in n for n in taken)


def test_a_loss_is_the_unit_where_there_is_one():
    def loss(output: Any, batch: Any) -> torch.Tensor:
        return output["logits"].square().mean()

    converted = convert(loss=loss)
    assert any("its loss rose by" in n for n in converted.plan.notes)


def test_nothing_left_to_convert_is_an_error():
    with pytest.raises(LostError, match=r"nothing is left to convert. cells.0: kept as the guide's: its divergence"):
        convert({f"cells.{k}": WILD for k in range(3)})


def test_without_a_gate_a_lost_conversion_is_an_error_that_names_the_part():
    with pytest.raises(LostError, match=r"cells.1 simply left out it is .* It is cells.1 that did most of it") as told:
        convert({**TARGETS, "cells.0": "keep", "cells.2": "keep"}, recipe={"max_drop": None})
    assert told.value.converted.plan.replaced[0].path == "cells.1"


def test_what_is_ahead_of_its_guide_by_the_users_loss_is_not_lost():
    """However far from the guide, and however near a guess is: it was asked to go there."""

    def nearer_to_nothing(output: Any, batch: Any) -> torch.Tensor:
        return output["logits"].square().mean()

    def farther_from_it(output: Any, batch: Any) -> torch.Tensor:
        return -output["logits"].square().mean()

    targets, recipe = {**TARGETS, "cells.0": "keep", "cells.2": "keep"}, {"max_drop": None}
    converted = convert(targets, recipe=recipe, loss=farther_from_it)
    assert converted.report.converted["loss"] < converted.report.guide["loss"]
    assert converted.report.converted["divergence"] > 10  # nats
    with pytest.raises(LostError, match="a uniform guess over 4 classes is nearer"):
        convert(targets, recipe=recipe, loss=nearer_to_nothing)


def test_a_gate_that_nothing_meets_changes_no_bit():
    recipe = {"steps": 12, "warmup": 1, "alignment": {"share": 0.5}}
    with_gate = convert("mingru", recipe={**recipe, "max_drop": 1e6})
    without = convert("mingru", recipe={**recipe, "max_drop": None})
    assert models.same_state(with_gate.module, without.module.state_dict())


def gated(folder: Path | None, schedule: str, second: str, most: float) -> thesean.Converted:
    recipe = {
        "steps": 24,
        "warmup": 1,
        "alignment": {"schedule": schedule, "share": 0.5, "check_every": 2},
        "retry": {"steps": 6, "warmup": 1},
        "max_drop": most,
    }
    return convert({**TARGETS, "cells.1": second}, recipe=recipe, workdir=folder)


uninterrupted = cache(partial(gated, None))  # the same, wherever another is stopped


@pytest.mark.thorough
@pytest.mark.parametrize("at", [2, 5, 7, 10, 13, 18])
@pytest.mark.parametrize(
    ("schedule", "second", "most", "gives_up"),
    [
        ("progressive", "identity", 0.05, True),
        ("progressive", "mingru", 0.0125, False),
        ("independent", "identity", 0.05, True),
        ("independent", "mingru", 0.0115, False),
    ],
)
def test_a_run_with_a_gate_goes_on_where_it_was(tmp_path: Path, schedule, at, second, most, gives_up):
    whole = uninterrupted(schedule, second, most)
    assert any("more than max_drop" in note for note in whole.report.notes)
    assert whole.plan.parts[1].kept == gives_up
    with stopped_at(at), pytest.raises(Interrupted):
        gated(tmp_path, schedule, second, most)
    again = gated(tmp_path, schedule, second, most)
    assert any("went on at step" in note for note in again.report.notes)
    assert models.same_state(again.module, whole.module.state_dict())
    assert again.plan.notes == whole.plan.notes
    assert thesean.Plan.from_yaml(tmp_path / "plan.yaml").notes == whole.plan.notes


def test_the_default_second_recipe_takes_no_step_where_the_first_takes_none():
    assert Recipe.named("fast").second.steps == 0
    assert Recipe.named("default").second.steps > 0
    assert Recipe.resolve({"retry": "paper"}).second.name == "paper"


def test_settings_round_trip(tmp_path: Path):
    recipe = Recipe.resolve({"max_drop": 0.1, "retry": {"name": "gentle", "steps": 20}})
    path = tmp_path / "recipe.yaml"
    recipe.to_yaml(path)
    assert Recipe.from_yaml(path) == recipe


def test_bounds_that_a_plan_was_chosen_for_are_told_to_be_in_doubt_once_a_part_is_kept():
    bound_plan, _ = drafted(captured.mlp())
    path = bound_plan.plan.parts[0].path
    assert STALE not in without(bound_plan, path, "told").plan.notes
    chosen = replace(bound_plan, plan=replace(bound_plan.plan, candidates=bound_plan.plan.parts))  # type: ignore[arg-type]
    kept = without(chosen, path, "told")
    assert kept.plan.notes[-2:] == (f"{path}: told", STALE)
    assert without(kept, bound_plan.plan.parts[1].path, "told").plan.notes.count(STALE) == 1


def test_the_row_of_a_part_that_is_kept_says_what_the_guides_own_plan_says_of_it():
    guide = captured.gpt2()
    bound_plan = make_plan(guide, "gru")
    path = bound_plan.plan.parts[0].path
    (row, *_) = without(bound_plan, path, "told").plan.parts
    (wanted, *_) = make_plan(guide, "gru", keep=[path]).plan.parts
    assert bound_plan.plan.parts[0].replaces
    assert row == wanted


def test_a_row_of_what_was_neither_solved_nor_trained_says_so():
    rows = convert("mingru", recipe={**UNTRAINED, "max_drop": None}).report.stages
    assert {(row.measure, row.stopped_by) for row in rows} == {("none", "not solved")}


def test_alignment_that_took_no_step_is_not_said_to_have_failed():
    recipe = {"steps": 2, "max_drop": None, "alignment": {"share": 0.5, "ceiling": 1e9}, "fine_tuning": {"share": 0.0}}
    converted = convert("mingru", recipe=recipe)
    assert {row.stopped_by for row in converted.report.stages} == {"ceiling"}
    assert not any("did not help" in note for note in converted.report.notes)
