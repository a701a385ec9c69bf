"""A budget of time or steps, and what it is spent on."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean
from tests import models
from tests.distill.test_gate import Cells, windows
from thesean.curve import Curve
from thesean.distill.aligning import Aligning
from thesean.distill.budget import Shares, Trial
from thesean.distill.train import _SCHEDULES, cosine
from thesean.errors import DataError
from thesean.journal import Interrupted, Journal
from thesean.request import spending

FEW = {"warmup": 1, "alignment": {"check_every": 5}}


def convert(budget: Any, recipe: Any = FEW, guide: type[Cells] = Cells, **settings: Any) -> thesean.Converted:
    given = {"data": windows(), "recipe": recipe, "budget": budget, "progress": False, **settings}
    return thesean.compile(models.seeded(guide), "mingru", **given)


@contextmanager
def slow_steps(later: float = 0.1, after: float = math.inf) -> Iterator[None]:
    """Inside, a step takes a tenth of a second by the clock, or as long as `later` says `after` so many; and all else a
    hundredth of the time that it takes.
    """
    taken, clock, after_step = itertools.count(1), time.monotonic, Journal.after_step
    begun, more = clock(), [0.0]

    def stepped(self: Journal, *arguments: Any) -> None:
        more[0] += 0.1 if next(taken) <= after else later
        after_step(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "after_step", stepped)
        patched.setattr(time, "monotonic", lambda: begun + (clock() - begun) / 100 + more[0])
        yield


@pytest.mark.parametrize(("budget", "seconds"), [("60s", 60), ("10min", 600), ("2h", 7200), ("0.5 h", 1800)])
def test_times_are_read(budget, seconds):
    assert spending(budget) == {"seconds": seconds}


@pytest.mark.parametrize("budget", ["60", "s", "-5s", "0s", "1d", True, -1, 1.5, ""])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(DataError, match="budget: expected a time"):
        spending(budget)


def test_steps_take_the_place_of_the_recipes():
    assert convert(12).report.steps == 12
    assert convert(0, {**FEW, "steps": 50}).report.steps == 0


def test_a_time_is_kept_and_the_report_says_why_each_phase_ended():
    with slow_steps():
        begun = time.monotonic()
        converted = convert("12s")
        took = time.monotonic() - begun
    solved = convert("12s", "fast")
    (shares,) = [n for n in converted.report.notes if n.startswith("budget 12 s:")]
    (ended,) = [n for n in converted.report.notes if n.startswith("alignment ended after")]
    said = re.search(r"of the rest (\d+)% for alignment .* by a trial's gain a second, (\S+) and (\S+)$", shares)
    assert said is not None
    share, aligned, tuned = map(float, said.groups())
    assert share == (80 if aligned > tuned else 0)
    # in about a second each gains no more than there was to gain
    assert 0 <= aligned < 2 * solved.report.converted["divergence"]
    assert 0 < tuned < 2 * solved.report.converted["divergence"]
    assert "fine-tuning after" in ended
    assert 11 < took < 14  # longer by a step, an evaluation and the report; whatever else runs here
    assert converted.report.steps > 20
    assert converted.report.converted["divergence"] < solved.report.converted["divergence"]
    assert any("the recipe 'fast' takes no steps" in n for n in solved.report.notes)


@pytest.mark.parametrize("max_drop", [None, 100.0])
def test_alignment_goes_on_from_its_trial(max_drop: float | None):
    recipe: dict[str, Any] = {**FEW, "fine_tuning": {"share": 0.0}, "alignment": {"check_every": 5, "patience": 100}}
    if max_drop is not None:
        recipe["max_drop"] = max_drop
    with slow_steps():
        report = convert("8s", recipe).report
    phases = [c.phase for c in report.curves]
    assert phases[0] == "trial"
    assert set(phases[1:]) == {"align"}
    trial, after = report.curves[:2]
    if max_drop is None:
        assert 0 < trial.kept <= trial.steps < 12  # of a tenth of a second, in 8% of eight
        kept = dict(trial.held_out)[trial.kept]
        assert after.held_out[0][1] == pytest.approx(kept, rel=1e-4)
        assert kept < trial.held_out[0][1]
    else:  # parts may be given up on the way
        assert after.held_out[0] == trial.held_out[0]
    assert report.steps == sum(c.steps for c in report.curves)


def test_once_the_time_is_up_no_other_rate_is_tried():
    worse = itertools.count(1.0)
    with slow_steps(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("thesean.distill.fine_tune._Tuner.check", lambda tuner: next(worse))
        report = convert("4s", TUNED_ALONE).report
    trial = [c.learning_rate for c in report.curves if c.phase == "trial"]
    assert trial == [2e-3, 1e-3]  # three steps each, of a tenth of a second, in 8% of four


def test_without_a_loss_alignment_may_get_most_of_the_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trial, "rate", property(lambda trial: 1.0 if trial.curves[0].part else 0.0))
    told = []
    cases: tuple[dict[str, Any], ...] = ({}, {"loss": squared})
    for settings in cases:
        with slow_steps():
            notes = convert("8s", **settings).report.notes
        told += [n for n in notes if n.startswith("budget 8")]
    assert "of the rest 80% for alignment and 20% for fine-tuning" in told[0]
    assert "of the rest 50% for alignment and 50% for fine-tuning" in told[1]


def test_alignment_is_left_out_where_to_judge_it_once_takes_longer_than_its_trial(monkeypatch: pytest.MonkeyPatch):
    more, solve = [0.0], Aligning.solve

    def slow(self: Aligning, *given: Any) -> None:
        solve(self, *given)
        more[0] += 3.0

    monkeypatch.setattr(Aligning, "solve", slow)
    with slow_steps(), pytest.MonkeyPatch.context() as patched:
        steps = time.monotonic
        patched.setattr(time, "monotonic", lambda: steps() + more[0])
        report = convert("12s").report
    (shares,) = [n for n in report.notes if n.startswith("budget 12 s:")]
    assert "a trial of" in shares  # of fine-tuning alone
    assert "0% for alignment and 100% for fine-tuning, as judging what is aligned takes 3" in shares
    assert {c.phase for c in report.curves} <= {"trial", "align", "fine-tune"}
    assert sum(c.steps for c in report.curves if c.phase == "align") == 0
    assert report.steps > 20


@pytest.mark.parametrize("max_drop", [None, 100.0])
def test_what_a_trial_gained_is_gone_on_from_where_nothing_is_aligned_in_between(max_drop: float | None):
    recipe = TUNED_ALONE | ({} if max_drop is None else {"max_drop": max_drop})  # parts may be given up on the way
    with slow_steps():
        report = convert("4s", recipe).report
    phases = [c.phase for c in report.curves]
    assert phases[-1] == "fine-tune"
    assert report.steps == sum(c.steps for c in report.curves)
    first = next(c for c in report.curves if c.phase == "fine-tune")
    if max_drop is None:
        trial = [c for c in report.curves if c.phase == "trial"]
        assert sum(c.steps for c in trial) < 14  # of a tenth of a second, in 8% of four
        assert first.held_out[0][1] == min(value for c in trial for _, value in c.held_out)
        assert first.held_out[0][1] < trial[0].held_out[0][1]
    else:
        assert first.held_out[0] == report.curves[0].held_out[0]


TUNED_ALONE = {**FEW, "alignment": {"schedule": "none", "share": 0.0}, "fine_tuning": {"share": 1.0}}


@pytest.mark.parametrize("pace", [0.05, 0.1, 0.3])
def test_steps_are_counted_anew_where_a_trial_had_another_pace(pace: float, monkeypatch: pytest.MonkeyPatch):
    factors = []

    def spied(step: int, steps: int, warmup: int) -> float:
        factors.append(cosine(step, steps, warmup))
        return factors[-1]

    monkeypatch.setitem(_SCHEDULES, "cosine", spied)
    monkeypatch.setattr("thesean.distill.fine_tune.RATES", (1e-4,))
    with slow_steps(pace, after=6):  # as many as the trial takes, in 8% of eight
        begun = time.monotonic()
        report = convert("8s", TUNED_ALONE).report
        took = time.monotonic() - begun
    (said,) = [n for n in report.notes if "fine-tuning after" in n]
    found = re.search(r"fine-tuning after (\d+) steps, by a trial's pace (\d+): the time was up", said)
    assert found is not None
    tuned, planned = map(int, found.groups())
    assert tuned * pace == pytest.approx(7.2, rel=0.1)  # seconds, after the trial
    assert 60 < planned < 100
    assert factors[-1] < 0.1  # it has fallen when the time is up
    assert 7 < took < 8 + 2 * pace


def test_a_run_that_goes_on_in_fine_tuning_has_the_time_that_was_left(tmp_path: Path):
    with slow_steps():
        whole = convert("8s", TUNED_ALONE).report
    after_step, taken = Journal.after_step, itertools.count(1)

    def stop(self: Journal, *given: Any) -> None:
        if next(taken) == 40:
            self.stopping = signal.SIGINT
        after_step(self, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "after_step", stop)
        with slow_steps(), pytest.raises(Interrupted):
            convert("8s", TUNED_ALONE, workdir=tmp_path)
    with slow_steps():
        again = convert("8s", TUNED_ALONE, workdir=tmp_path).report
    assert any("went on at step" in n for n in again.notes)
    assert again.steps == pytest.approx(whole.steps, abs=4)


def test_where_neither_trial_gains_the_lower_rates_of_fine_tuning_are_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trial, "rate", property(lambda trial: 0.0))
    with slow_steps():
        report = convert("8s").report
    (told,) = [n for n in report.notes if n.startswith("budget 8")]
    assert "of the rest 0% for alignment and 100% for fine-tuning, neither trial having gained" in told
    assert sum(c.steps for c in report.curves if c.phase == "align") == 0


def test_a_time_that_the_closed_form_needs_leaves_none():
    converted = convert("0.001s")
    assert converted.report.steps == 0
    assert any("no time was left" in n for n in converted.report.notes)
    assert len(converted.plan.replaced) == 3


@pytest.mark.parametrize(
    ("alignment", "tuning", "shared"),
    [
        (
            {"schedule": "progressive", "share": 0.3},
            0.4,
            "30% for alignment and 70% for fine-tuning, as the recipe shares",
        ),
        ({"schedule": "none", "share": 0.3}, 0.4, "0% for alignment and 100% for fine-tuning, all that the recipe has"),
        ({"share": 0.0}, 0.4, "0% for alignment and 100% for fine-tuning, all that the recipe has"),
        ({"share": 0.3}, 0.0, "100% for alignment and 0% for fine-tuning, all that the recipe has"),
    ],
)
def test_other_recipes_share_as_they_say(alignment, tuning, shared):
    recipe = {**FEW, "alignment": {**alignment, "check_every": 5}, "fine_tuning": {"share": tuning}}
    with slow_steps():
        converted = convert("8s", recipe)
    (told,) = [n for n in converted.report.notes if n.startswith("budget 8")]
    assert told.endswith(f"of the rest {shared}")
    assert converted.report.steps > 0


def test_shares_are_kept_as_they_are():
    for trial in (None, Trial(gain=0.5, seconds=2.0, steps=10)):
        shares = Shares(align=3, aligning=trial, tuning=trial, told="so")
        assert Shares.from_dict(json.loads(json.dumps(shares.to_dict()))) == shares
    curve = Curve(
        phase="trial",
        part=None,
        learning_rate=1e-3,
        steps=3,
        every=1,
        losses=(1.0,),
        held_out=((0, 2.0), (2, 1.0)),
        kept=2,
    )
    weights = {"a": torch.ones(2)}
    shares = Shares(align=0, tuning=Trial(gain=0.5, seconds=2.0, steps=10, curves=(curve,)), told="so", tuned=weights)
    read = Shares.from_dict(shares.to_dict())
    assert read.tuned is weights
    assert read.curves == (curve,)
    shares = replace(shares, tuned=None)
    assert shares.curves == (replace(curve, kept=0),)
    assert Shares.from_dict(json.loads(json.dumps(shares.to_dict()))) == shares


def test_a_trial_tells_how_many_steps_fit():
    trial = Trial(gain=0.5, seconds=2.0, steps=10)
    assert trial.rate == 0.25
    assert trial.steps_in(5.0) == 25
    assert trial.steps_in(-1.0) == 0
    # what comes before the first step, and after the last one, doesn't grow with them
    assert Trial(gain=0.5, seconds=2.0, steps=10, stepping=1.0).steps_in(5.0) == 50


def test_a_finished_run_of_a_budget_is_read_again(tmp_path: Path):
    with slow_steps():
        first = convert("6s", workdir=tmp_path)
    again = convert("6s", workdir=tmp_path)
    assert models.same_state(again.module, first.module.state_dict())
    assert [n for n in again.report.notes if "budget" in n] == [n for n in first.report.notes if "budget" in n]


class Pooled(Cells):
    """Four numbers a row, where a part's exit has eight a step."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": super().forward(x)["logits"].mean(1)}


# of 200 steps each trial takes twenty
TRIED: dict[str, Any] = {"steps": 200, **FEW}
STILL = {"learning_rate": 1e-9}


def tried(recipe: Any = TRIED, guide: type[Cells] = Pooled, **settings: Any) -> thesean.Converted:
    return convert(None, recipe, guide, **settings)


def told_of_steps(report: Any) -> list[str]:
    return [n for n in report.notes if n.startswith("steps: after")]


def test_steps_go_on_with_alignment_where_its_trial_gained_more():
    report = tried({**TRIED, "fine_tuning": STILL}).report
    (told,) = told_of_steps(report)
    said = re.search(r"after 20 steps of either alignment gained (\S+) on held-out data, fine-tuning (\S+);", told)
    assert said is not None
    aligned, tuned = map(float, said.groups())
    assert aligned > tuned
    assert told.endswith("up to 160 are alignment's")
    trials = [c for c in report.curves if c.phase == "trial"]
    aligning = next(c for c in report.curves if c.phase == "align")
    assert [c.steps for c in trials] == [20, 20]
    assert trials[0].kept
    assert not trials[1].kept  # it is not gone on from
    assert aligning.held_out[0][1] == pytest.approx(dict(trials[0].held_out)[trials[0].kept], rel=1e-4)
    assert aligning.steps <= 140
    assert report.steps == sum(c.steps for c in report.curves) == 200


def test_steps_go_on_with_fine_tuning_where_its_trial_gained_more():
    alignment = {"patience": 100, **STILL, "refit": False}
    unsolved = {**TRIED, "closed_form": {"enabled": False}, "alignment": alignment}
    report = tried({**unsolved, "fine_tuning": {"learning_rate": 1e-3}}).report
    (told,) = told_of_steps(report)
    assert told.endswith("all others are fine-tuning's")
    trial = next(c for c in report.curves if c.phase == "trial" and c.part is None)
    tuning = next(c for c in report.curves if c.phase == "fine-tune")
    assert sum(c.steps for c in report.curves if c.phase == "align") == 0
    assert not any(c.kept for c in report.curves if c.phase == "trial" and c.part is not None)
    assert tuning.held_out[0][1] == min(value for _, value in trial.held_out) < trial.held_out[0][1]
    assert tuning.steps == 160
    assert report.steps == sum(c.steps for c in report.curves) == 200


def squared(output: Any, batch: Any) -> torch.Tensor:
    return next(iter(output.values())).square().mean()


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ({"steps": 190}, {}),
        ({"alignment": {"share": 0.1}}, {}),
        ({"alignment": {"schedule": "progressive"}}, {}),
        ({"fine_tuning": {"share": 0.0}}, {}),
        ({"max_drop": 100.0}, {}),
        ({}, {"loss": squared}),
        ({}, {"guide": Cells}),
    ],
    ids=["few steps", "as told", "stages", "no fine-tuning", "parts may be given up", "labels", "many outputs"],
)
def test_elsewhere_a_tenth_of_the_steps_is_alignments(recipe: dict[str, Any], settings: dict[str, Any]):
    alignment = {"patience": 100, "ceiling": 0.0, **recipe.get("alignment", {})}
    report = tried({**TRIED, **recipe, "alignment": alignment}, **settings).report
    assert not told_of_steps(report)
    assert not any(c.phase == "trial" for c in report.curves)
    asked = recipe.get("steps", 200)
    assert sum(c.steps for c in report.curves if c.phase == "align") == asked // 10


def test_a_run_stopped_in_a_trial_goes_on_to_the_same_weights(tmp_path: Path):
    whole, after_step = tried(), Journal.after_step
    for at in (7, 27, 47):  # in the first trial, in the second, and after both
        taken = itertools.count(1)

        def stop(self: Journal, *given: Any, at: int = at, taken: Iterator[int] = taken) -> None:
            if next(taken) == at:
                self.stopping = signal.SIGINT
            after_step(self, *given)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Journal, "after_step", stop)
            with pytest.raises(Interrupted):
                tried(workdir=tmp_path / str(at))
        again = tried(workdir=tmp_path / str(at))
        assert any("went on at step" in n for n in again.report.notes)
        assert models.same_state(again.module, whole.module.state_dict())
        assert told_of_steps(again.report) == told_of_steps(whole.report)
