"""Parts that stay the guide's: those that it can least do without."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import thesean
import thesean.distill.keep_best as keep_best_module
from tests import models
from tests.distill.test_gate import WILD, Cells, windows
from thesean.distill.evaluate import Judge
from thesean.distill.keep_best import shared
from thesean.errors import PlanError
from thesean.passes.capture.capture import capture
from thesean.passes.graph import walk
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
    assert any(note.startswith("cells.1: kept: with it alone replaced the network is") for note in converted.plan.notes)
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


@pytest.mark.parametrize(("middle", "looks"), [(WILD, 3), ("mingru", 12)])
def test_what_is_plain_on_one_batch_is_judged_on_no_further_one(monkeypatch, middle, looks):
    """Three parts, and two batches as they are and repeating themselves."""
    asked: list[int] = []
    monkeypatch.setattr(keep_best_module, "Judge", type("Counted", (Judge,), {"of": _counted(asked)}))
    plan = convert({**dict.fromkeys(TARGETS, "mingru"), "cells.1": middle}).plan
    assert sum(p.kept for p in plan) == 1
    assert len(asked) == looks


def _counted(asked: list[int]) -> Any:
    def of(self: Judge, output_of: Any, numbers: Any = None) -> Any:
        asked.extend(numbers)
        return Judge.of(self, output_of, numbers)

    return of


def test_parts_are_solved_alone_by_one_walk_through_the_guide(monkeypatch):
    runs, values, solved = Counter[Any](), walk.value_of, keep_best_module._solved_alone

    def counted(graph_module: Any, node: Any, env: Any, inputs: Any) -> Any:
        runs[node, id(inputs)] += 1
        return values(graph_module, node, env, inputs)

    def watched(*given: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(walk, "value_of", counted)
            return solved(*given)

    monkeypatch.setattr(keep_best_module, "_solved_alone", watched)
    convert()
    assert len(runs) > len(TARGETS)
    assert set(runs.values()) == {1}


class Overflowing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - torch.full_like(x, 3e38) * 2 + torch.full_like(x, 3e38) * 2


def test_a_part_that_leaves_no_number_is_kept_before_all_others():
    broken = thesean.Target("overflowing", build=lambda part: Overflowing())
    plan = convert({**dict.fromkeys(TARGETS, "mingru"), "cells.0": broken}).plan
    assert [p.path for p in plan if p.kept] == ["cells.0"]


class Recall(nn.Module):
    """A token that was told eight or more steps ago and comes again."""

    def forward(self, x_BTV: torch.Tensor) -> torch.Tensor:
        time = x_BTV.shape[1]
        far_TT = torch.ones(time, time, device=x_BTV.device).tril(-8)
        told: torch.Tensor = (x_BTV @ x_BTV.mT * far_TT).sum(-1, keepdim=True).clamp(max=1.0) * x_BTV
        return told


class Remembering(nn.Module):
    """What is near always counts a little; what is far only where it comes again, and then much."""

    def __init__(self, words: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.eye(words))
        self.near, self.far = nn.GRU(words, words, batch_first=True), Recall()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(input_ids)
        return {"logits": x + 2 * self.near(x)[0] + 8 * self.far(x)}


@pytest.mark.parametrize(("seen", "kept"), [(True, "far"), (False, "near")])
def test_what_is_far_counts_though_no_batch_comes_back_to_it(monkeypatch, seen, kept):
    """Ordinary rows name each word once: on them alone the part that recalls does nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.stack([torch.randperm(64, generator=generator)[:20] for _ in range(4)])} for _ in range(6)
    ]
    if not seen:
        monkeypatch.setattr(keep_best_module, "repeating", lambda *_: None)
    guide = models.seeded(Remembering)
    plan = thesean.compile(
        guide, "mingru", parts=["near", "far"], data=rows, recipe={"keep_best": 1, **SOLVED}, progress=False
    ).plan
    assert [p.path for p in plan if p.kept] == [kept]
    assert any("on sequences that end as they begin" in note for note in plan.notes) == seen


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_a_guide_with_one_part_replaced_runs_on_from_where_it_differs(make):
    """To the bit, and nothing before the part runs again."""
    guide, ids = make(), models.tokens(2, 16)
    bound_plan = make_plan(capture(guide, {"input_ids": ids}), "rnn")
    hybrid = trial_hybrid(bound_plan, share=True)
    whole, inputs = bound_plan.captured.graph_module, {"input_ids": ids}
    views = [view_of(bound_plan, hybrid, [part]).graph_module.eval() for part in range(len(hybrid.parts))]
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
    monkeypatch.setattr("thesean.distill.keep_best._harm", stop)
    again = convert(workdir=tmp_path / "part", resume="must")
    assert models.same_state(again.module, whole.module.state_dict())
