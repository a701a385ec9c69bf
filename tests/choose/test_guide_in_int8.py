"""What a faster plan is set against: the guide itself with weights of 8 bits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests.choose.test_known_choices import chosen, clock, guide  # noqa: F401
from tests.models import vectors
from thesean.choose.latency import PlanTimer
from thesean.deploy.session import Session
from thesean.deploy.timing.latency import Timing
from thesean.errors import ExportError
from thesean.passes.plan.bind import BoundPlan

EXACT = Timing(median_ms=10.0, p20_ms=9.5, p80_ms=11.0, repeats=9)
HELD_OUT = [vectors(16, 8, seed=99)]

pytestmark = pytest.mark.usefixtures("clock")


def told(monkeypatch: pytest.MonkeyPatch, int8_ms: float, speedup: float, **settings: Any) -> list[str]:
    """Of the guide in int8, which takes so long."""
    timing = replace(EXACT, median_ms=int8_ms)
    monkeypatch.setattr(PlanTimer, "beside_guide", lambda self, path: (EXACT, timing))
    plan = chosen({"speedup": speedup}, **settings)
    return [note for note in plan.notes if note.startswith("the guide itself in int8")]


@pytest.mark.parametrize(("int8_ms", "where"), [(4.0, "within that bound"), (9.0, "not within that bound")])
def test_its_latency_is_set_against_the_bound(monkeypatch, int8_ms, where):
    (note,) = told(monkeypatch, int8_ms, 1.25)
    assert f"{int8_ms:.3g} ms, {10 / int8_ms:.2f} times as fast as the guide" in note
    assert f", {where}" in note
    assert ("thesean.export_guide(model, path, quantize='int8')" in note) == (where == "within that bound")


def test_its_divergence_is_that_of_the_file_that_export_guide_writes(monkeypatch, tmp_path: Path):
    (note,) = told(monkeypatch, 4.0, 1.25, eval_data=HELD_OUT)
    report = thesean.export_guide(guide(), tmp_path / "g.onnx", data=HELD_OUT, quantize="int8")
    (found,) = Session(report.path).run({report.inputs[0]: HELD_OUT[0].numpy()})[0].values()
    with torch.no_grad():
        wanted = guide()(HELD_OUT[0])
    off = (torch.from_numpy(found) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    (number,) = re.findall(r"divergence (\S+),", note)
    assert 0 < off < 0.1
    assert float(number) == pytest.approx(off.item(), rel=0.02)


class Pooled(nn.Module):
    """x_BCHW -> y_BC: it multiplies by no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).mean((2, 3))


def test_a_guide_that_multiplies_by_no_matrix_is_chosen_for_without(monkeypatch):
    monkeypatch.setattr(PlanTimer, "beside_guide", lambda self, path: pytest.fail("nothing to time"))
    data = [torch.randn(4, 4, 6, 6) for _ in range(4)]
    plan = thesean.plan(
        Pooled(), "auto", data=data, constraints={"speedup": 1.25}, candidates=["keep", "identity"], progress=False,
    )  # fmt: skip
    assert any(note.startswith("measured ") for note in plan.notes)
    assert not any("int8" in note for note in plan.notes)


def test_a_plan_without_a_bound_of_latency_says_nothing_of_it():
    assert not any("int8" in note for note in chosen({"params": 10}).notes)


def test_it_is_tried_once_though_a_plan_that_cannot_be_exported_has_all_timed_anew(monkeypatch, caplog):
    tries = []

    def exported(self: PlanTimer, bound_plan: BoundPlan) -> None:
        if [part.path for part in bound_plan.plan.replaced] == ["1"]:
            raise ExportError("not that one")

    def quantised(self: PlanTimer) -> Path:
        tries.append(self)
        raise ExportError("nothing to quantise")

    monkeypatch.setattr(PlanTimer, "export", exported)
    monkeypatch.setattr(PlanTimer, "guide_in_int8", quantised)
    with caplog.at_level("WARNING"):
        plan = chosen({"speedup": 1.25})
    assert caplog.text.count("a plan is left out: not that one") == 2  # once a round
    assert len(tries) == 1
    assert not any("int8" in note for note in plan.notes)
