"""Parts that stay the guide's: those whose return helps most once all are replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thesean
from tests import models
from tests.distill.test_gate import WILD, Cells, windows
from thesean.distill.keep_best import shared
from thesean.errors import PlanError
from thesean.passes.capture.capture import capture
from thesean.passes.graph.tail import Tail
from thesean.passes.graph.walk import Walk
from thesean.passes.plan.hybrid import trial_hybrid, view_of
from thesean.passes.plan.make_plan import make_plan

SOLVED = {"steps": 0, "alignment": {"schedule": "none"}}
TARGETS = {"cells.0": "mingru", "cells.1": WILD, "cells.2": "mingru"}


def convert(target: Any = TARGETS, keep_best: int = 1, **settings: Any) -> thesean.Converted:
    recipe = {"keep_best": keep_best, **SOLVED}
    return thesean.compile(models.seeded(Cells), target, data=windows(), recipe=recipe, progress=False, **settings)


def test_the_part_that_does_most_harm_is_kept_and_the_rest_is_as_if_it_had_been_asked_for():
    converted = convert()
    assert [p.target for p in converted.plan] == ["mingru", "keep", "mingru"]
    assert any(note.startswith("cells.1: kept: with all replaced the network is") for note in converted.plan.notes)
    asked = convert({**TARGETS, "cells.1": "keep"}, keep_best=0)
    assert models.same_state(converted.module, asked.module.state_dict())
    assert converted.plan.new_params == asked.plan.new_params == asked.report.params == converted.report.params
    assert [row.part for row in converted.report.stages] == ["cells.0", "cells.2"]


def test_what_is_kept_is_no_farther_from_the_guide_than_any_other_choice():
    guide = models.seeded(Cells)
    with torch.no_grad():
        for weight in guide.cells[1].parameters():
            weight *= 3.0

    def divergence(**chosen: Any) -> float:
        keep, recipe = chosen.pop("keep", ()), {**SOLVED, **chosen}
        found = thesean.compile(guide, "mingru", data=windows(), recipe=recipe, keep=keep, progress=False)
        return float(found.report.converted["divergence"] or 0.0)

    others = [divergence(keep=[path]) for path in ("cells.0", "cells.1", "cells.2")]
    assert divergence(keep_best=1) == pytest.approx(min(others))
    assert min(others) < 0.7 * max(others)


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_a_network_with_one_part_less_runs_on_from_where_it_differs(make):
    """To the bit, and nothing before the part runs again."""
    guide, ids = make(), models.tokens(2, 16)
    bound_plan = make_plan(capture(guide, {"input_ids": ids}), "rnn")
    hybrid = trial_hybrid(bound_plan, share=True)
    whole, inputs = hybrid.graph_module.eval(), {"input_ids": ids}
    parts = range(len(hybrid.parts))
    views = [view_of(bound_plan, hybrid, [k for k in parts if k != part]).graph_module.eval() for part in parts]
    reads = [shared(view, whole) for view in views]
    tails = [Tail(view, names) for view, names in zip(views, reads, strict=True)]
    walk = Walk(whole, [sorted(names) for names in reads], [inputs])
    with torch.no_grad():
        for part, (view, tail) in enumerate(zip(views, tails, strict=True)):
            found, expected = tail.output(walk.get(part, 0), inputs), view(**inputs)
            assert torch.equal(found["logits"], expected["logits"])
            assert not torch.equal(found["logits"], whole(**inputs)["logits"])
    assert len(tails[-1].run) < len(tails[0].run) < len(views[0].graph.nodes)


def test_all_parts_can_not_be_kept():
    with pytest.raises(PlanError, match="keep_best=3: the plan replaces 3 parts, and one at least must be"):
        convert(keep_best=3)


def test_an_interrupted_run_does_not_choose_again(tmp_path, monkeypatch):
    def stop(*_: Any) -> None:
        raise RuntimeError("pulled the plug")

    whole = convert(workdir=tmp_path / "whole")
    monkeypatch.setattr("thesean.compiler.align", stop)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        convert(workdir=tmp_path / "part")
    monkeypatch.undo()
    monkeypatch.setattr("thesean.distill.keep_best._returns", stop)
    again = convert(workdir=tmp_path / "part", resume="must")
    assert models.same_state(again.module, whole.module.state_dict())
