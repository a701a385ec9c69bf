"""What a person sees while a conversion runs: a bar on a terminal, plain lines elsewhere, both on stderr.

An observer has `begin(phase, part, stage, stages, steps)`, `step(step, values)`, `end(values)` and `close()`.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from thesean import ranks
from thesean.errors import DataError, unknown_name
from thesean.observer import Observer
from thesean.report.lines import JsonLines, Several
from thesean.report.trackers import TRACKERS, Tracked
from thesean.units import duration

Watching = bool | str | Observer | Sequence[bool | str | Observer]


def make_observer(progress: Watching, log: Path | None = None) -> Observer:
    """Silent where `progress` is or holds False, a bar when stderr is a terminal, else plain lines; and every step in
    `log`. Told besides are trackers by their names and observers of the caller's own. Raises UnknownNameError,
    MissingExtraError, DataError.
    """
    given = list(progress) if isinstance(progress, Sequence) and not isinstance(progress, str) else [progress]
    shows = not any(one is False for one in given)
    observers = [_told_besides(one, log) for one in given if not isinstance(one, bool)]
    shown: Observer = NullObserver() if not shows else RichObserver() if sys.stderr.isatty() else PlainObserver()
    # a tracker looks at what an earlier call left in the log, so that it comes first
    observers = [shown, *observers, *([JsonLines(log)] if log is not None else [])]
    return shown if len(observers) == 1 else Several(observers)


@contextmanager
def watched(progress: Watching, log: Path | None = None) -> Iterator[Observer]:
    """Whoever is told of progress, closed at the end, whatever happens. Of several ranks the first one tells."""
    observer = make_observer(progress, log) if ranks.is_first() else NullObserver()
    try:
        yield observer
    finally:
        observer.close()


def _told_besides(given: str | Observer, log: Path | None) -> Observer:
    if isinstance(given, str):
        if given not in TRACKERS:
            raise unknown_name("observer", given, TRACKERS)
        return Tracked(TRACKERS[given](), log)
    missing = [name for name in ("begin", "step", "end", "close") if not callable(getattr(given, name, None))]
    if missing:
        raise DataError(
            f"progress: expected True, False, {', '.join(map(repr, TRACKERS))} or an observer, found "
            f"{type(given).__name__}, which has no {missing[0]}()."
        )
    return given


class NullObserver:
    """Says nothing."""

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        """A stage starts."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """An optimizer step was done."""

    def end(self, values: Mapping[str, float]) -> None:
        """The stage is over."""

    def close(self) -> None:
        """The conversion is over."""


class PlainObserver:
    """A line when a stage begins and ends, and one every `interval_s` seconds between."""

    def __init__(
        self,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._interval_s, self._clock = stream, interval_s, clock
        self._label, self._steps = "", 0
        self._began = self._spoke = clock()

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        self._label, self._steps = stage_label(phase, part, stage, stages), steps
        self._began = self._spoke = self._clock()
        self._say(self._label + (f": {steps} steps" if steps else ""))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        now = self._clock()
        if now - self._spoke < self._interval_s:
            return
        self._spoke = now
        left = ""
        if self._steps > step > 0:
            left = f", {duration((now - self._began) / step * (self._steps - step))} left"
        progress = f"step {step}/{self._steps}" if self._steps else f"step {step}"
        self._say(f"{self._label}: {progress} {describe(values)}".rstrip() + left)

    def end(self, values: Mapping[str, float]) -> None:
        self._say(f"{self._label}: done in {duration(self._clock() - self._began)} {describe(values)}".rstrip())

    def close(self) -> None:
        """Nothing to restore."""

    def _say(self, line: str) -> None:
        # stderr is looked up late: a test or a notebook may have put another in its place
        print(line, file=self._stream or sys.stderr, flush=True)


class RichObserver:
    """A bar with stage k/n, part, step, measure and time left; each finished stage leaves one line above it.

    The terminal's cursor comes back when `close` is called, when the observer is forgotten, or at the interpreter's
    exit, whichever is first: ctrl-C in a stage skips `end`.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            # rich would send stdout's text to this console, which is stderr: wrong in `thesean convert ... > file`
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task: TaskID | None = None
        self._label, self._steps, self._began = "", 0, 0.0
        self._restore = weakref.finalize(self, self._progress.stop)

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        self._label, self._steps, self._began = stage_label(phase, part, stage, stages), steps, time.monotonic()
        self._drop()
        self._progress.start()
        self._task = self._progress.add_task(
            escape(self._label), total=steps or None, count=f"0/{steps}" if steps else "", values=""
        )

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if self._task is None:
            return
        count = f"{step}/{self._steps}" if self._steps else str(step)
        self._progress.update(self._task, completed=step, count=count, values=escape(describe(values)))

    def end(self, values: Mapping[str, float]) -> None:
        self._drop()
        took = duration(time.monotonic() - self._began)
        line = f"{self._label}: done in {took} {describe(values)}".rstrip()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._drop()
        self._progress.stop()

    def _drop(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def stage_label(phase: str, part: str | None, stage: int, stages: int) -> str:
    """ "stage 2/5 align transformer.h.1" """
    return f"stage {stage}/{stages} {phase}" + (f" {part}" if part else "")


def describe(values: Mapping[str, float]) -> str:
    """ "loss 1.407, cka 0.981" """
    return ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
