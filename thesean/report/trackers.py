"""Observers that hand every step to a tracker of experiments: TensorBoard and trackio, each where it is installed.

Steps are counted over the whole run, those that a continued run takes again too: a curve has one value at a step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from thesean.errors import MissingExtraError
from thesean.warn import warn

_PROJECT = "thesean"


class Tracker(Protocol):
    """`log` is where the run tells its steps, in its folder; None without a folder."""

    def open(self, log: Path | None) -> None: ...

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder, or else where TensorBoard looks: runs/DATE_HOST."""

    name = "tensorboard"

    def __init__(self) -> None:
        """Raises MissingExtraError."""
        try:
            self._writer_of: Callable[..., Any] = import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard") from error
        self._writer: Any = None

    def open(self, log: Path | None) -> None:
        self._writer = self._writer_of(log_dir=None if log is None else str(log.parent / "tensorboard"))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Trackio:
    """A run in trackio's project "thesean", called as the run's folder; one that goes on is the same there."""

    name = "trackio"

    def __init__(self) -> None:
        """Raises MissingExtraError."""
        try:
            self._trackio: Any = import_module("trackio")
        except ImportError as error:
            raise MissingExtraError("trackio", "trackio") from error
        self._run: Any = None

    def open(self, log: Path | None) -> None:
        name = None if log is None else log.resolve().parent.name
        resume = "allow" if log is not None and log.exists() else "never"
        with redirect_stdout(sys.stderr):  # it greets
            self._run = self._trackio.init(project=_PROJECT, name=name, resume=resume, embed=False)

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        if self._run is not None:
            with redirect_stdout(sys.stderr):
                self._run.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {kind.name: kind for kind in (TensorBoard, Trackio)}


class Tracked:
    """Tells a tracker: "align h.0/loss" each step, "align h.0/held out nmse" at the end of a stage.

    It is opened when the first stage begins. What it raises is told once, and the run goes on without it.
    """

    def __init__(self, tracker: Tracker, log: Path | None = None) -> None:
        self.tracker, self._log = tracker, log
        self._where, self._taken = "", 0
        self._opened = self._failed = False

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        self._where = phase + (f" {part}" if part else "")
        if not self._opened:
            self._opened = True
            self._try(self._open)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._taken += 1
        self._write({f"{self._where}/{name}": value for name, value in values.items()})

    def end(self, values: Mapping[str, float]) -> None:
        self._write({f"{self._where}/{_held_out(name)}": value for name, value in values.items()})

    def close(self) -> None:
        if self._opened:
            self._try(self.tracker.close)

    def _open(self) -> None:
        self._taken = _steps_in(self._log)
        self.tracker.open(self._log)

    def _write(self, values: Mapping[str, float]) -> None:
        finite = {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
        if finite:
            self._try(lambda: self.tracker.write(finite, self._taken))

    def _try(self, act: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:  # a full disk, a server that went: whatever a tracker raises
            self._failed = True
            name = type(self.tracker).__name__
            warn([f"{name}: no more steps are told there: {type(error).__name__}: {str(error)[:200]}"])


def _held_out(name: str) -> str:
    return name if name.startswith("held out") else f"held out {name}"


def _steps_in(log: Path | None) -> int:
    """That an earlier call took of the same run."""
    if log is None or not log.exists():
        return 0
    with log.open(encoding="utf-8") as lines:
        return sum('"event": "step"' in line for line in lines)
