"""Steps handed to TensorBoard and trackio. Neither needs to be installed: what stands in keeps what it was told."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import thesean
from tests import models
from tests.models import vectors
from thesean.errors import DataError, MissingExtraError, UnknownNameError
from thesean.journal import Interrupted, Journal
from thesean.report.trackers import Tracked

RECIPE = {"steps": 12, "warmup": 1, "alignment": {"share": 0.5, "check_every": 2}}


class Writer:
    """TensorBoard's, as far as it is called."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, log_dir: str | None = None) -> None:
        self.log_dir, self.closed = log_dir, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


class Run:
    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.logged, self.finished = given, [], False  # type: ignore[var-annotated]

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    stands_in = ModuleType("torch.utils.tensorboard")
    stands_in.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stands_in)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    runs: list[Run] = []

    def init(**given: Any) -> Run:
        print("* Trackio project initialized")
        runs.append(Run(given))
        return runs[-1]

    stands_in = ModuleType("trackio")
    stands_in.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", stands_in)
    return runs


def convert(progress: Any, workdir: Path | None = None, **settings: Any) -> thesean.Converted:
    data = [vectors(8, 8, seed=k) for k in range(5)]
    given = {"data": data, "recipe": RECIPE, "workdir": workdir, **settings}
    return thesean.compile(models.mlp(), "mlp", progress=progress, **given)


def test_every_step_is_a_scalar_in_the_folder_of_the_run(tmp_path: Path, tensorboard: list[Writer]):
    converted = convert([False, "tensorboard"], tmp_path)
    (writer,) = tensorboard
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.closed
    losses = [(value, step) for tag, value, step in writer.scalars if tag.endswith("/loss")]
    assert [step for _, step in losses] == list(range(1, converted.report.steps + 1))
    curves = [loss for curve in converted.report.curves for loss in curve.losses]
    assert [value for value, _ in losses] == pytest.approx(curves, rel=1e-5)
    tags = {tag for tag, _, _ in writer.scalars}
    assert {"align 3 parts/loss", "align 3 parts/held out nmse", "fine-tune/loss", "fine-tune/held out"} <= tags


def test_without_a_folder_tensorboard_chooses_its_own(tensorboard: list[Writer]):
    convert([False, "tensorboard"])
    assert tensorboard[0].log_dir is None


def test_trackio_has_a_run_of_the_folders_name_and_prints_nothing_to_stdout(tmp_path: Path, trackio: list[Run], capsys):
    converted = convert([False, "trackio"], tmp_path / "mine")
    (run,) = trackio
    assert run.given == {"project": "thesean", "name": "mine", "resume": "never", "embed": False}
    assert run.finished
    steps = [step for step, values in run.logged if any(tag.endswith("/loss") for tag in values)]
    assert steps == list(range(1, converted.report.steps + 1))
    assert capsys.readouterr().out == ""


def test_a_run_that_goes_on_goes_on_there(tmp_path: Path, trackio: list[Run], monkeypatch: pytest.MonkeyPatch):
    taken, after_step = 0, Journal.after_step

    def stopped(self: Journal, step: int, *parts: Any) -> None:
        nonlocal taken
        taken += 1
        self.stopping = signal.SIGINT if taken == 9 else 0
        after_step(self, step, *parts)

    monkeypatch.setattr(Journal, "after_step", stopped)
    with pytest.raises(Interrupted):
        convert([False, "trackio"], tmp_path)
    monkeypatch.setattr(Journal, "after_step", after_step)
    convert([False, "trackio"], tmp_path)
    first, second = trackio
    assert first.finished
    assert second.given["resume"] == "allow"
    assert second.given["name"] == first.given["name"]
    told = [step for run in trackio for step, values in run.logged if any(tag.endswith("/loss") for tag in values)]
    assert told == list(range(1, 13))  # it stopped after a step, so that none was taken again


def test_an_observer_of_ones_own_is_told_beside_what_is_shown(capsys):
    class Counting:
        steps = closed = 0

        def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None: ...

        def step(self, step: int, values: dict[str, float]) -> None:
            self.steps += 1

        def end(self, values: dict[str, float]) -> None: ...

        def close(self) -> None:
            self.closed += 1

    own = Counting()
    converted = convert(own)
    assert (own.steps, own.closed) == (converted.report.steps, 1)
    assert "stage 1/1 align" in capsys.readouterr().err


def test_who_watches_changes_no_bit(tensorboard: list[Writer]):
    watched, alone = convert([False, "tensorboard"]), convert(False)
    assert models.same_state(watched.module, alone.module.state_dict())


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_what_is_not_installed_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch, name: str, module: str):
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    monkeypatch.setattr("thesean.compiler.capture", pytest.fail)
    with pytest.raises(
        MissingExtraError, match=f"^{name} is not installed. Install it with: pip install .*{name}"
    ) as told:
        convert(name)
    assert "\n" not in str(told.value)


def test_names_and_things_that_are_no_observer_are_refused():
    with pytest.raises(UnknownNameError, match="unknown observer 'tensorbord'; did you mean 'tensorboard'"):
        convert("tensorbord")
    with pytest.raises(
        DataError, match=r"progress: expected True, False, 'tensorboard'.*found int, which has no begin"
    ):
        convert(3)


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(trackio: list[Run], monkeypatch: pytest.MonkeyPatch):
    def fails(self: Run, values: dict[str, float], step: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Run, "log", fails)
    with pytest.warns(UserWarning, match="Trackio: no more steps are told there: OSError: no space") as told:
        converted = convert([False, "trackio"])
    assert len([w for w in told if "Trackio" in str(w.message)]) == 1
    assert converted.report.steps == 12


def test_what_is_no_number_is_left_out():
    class Kept:
        def __init__(self) -> None:
            self.found: list[Any] = []

        def open(self, log: Path | None) -> None: ...

        def write(self, values: Any, step: int) -> None:
            self.found.append((dict(values), step))

        def close(self) -> None: ...

    kept = Kept()
    tracked = Tracked(kept)
    tracked.begin("align", "h.0", 1, 2, 3)
    tracked.step(1, {"loss": float("nan")})
    tracked.step(2, {"loss": torch.tensor(0.5).item(), "rate": float("inf")})
    assert kept.found == [({"align h.0/loss": 0.5}, 2)]
