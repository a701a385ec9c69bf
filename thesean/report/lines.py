"""Every step of a run as a line of JSON, in its folder, for whoever draws curves.

    {"event": "begin", "time": 1764244800.1, "phase": "align", "part": "h.0", "stage": 1, "stages": 4, "steps": 40}
    {"event": "step", "time": 1764244800.3, "phase": "align", "part": "h.0", "step": 1, "loss": 0.31}
    {"event": "end", "time": 1764244808.9, "phase": "align", "part": "h.0", "nmse": 0.12}

A run that goes on appends; a step that it takes again stands there twice, and the later line counts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from thesean.observer import Observer
from thesean.warn import warn


class JsonLines:
    """An observer that writes to `path`. A disk that takes no more is told once, and the run goes on."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._file: TextIO | None = None
        self._failed = False
        self._where: dict[str, Any] = {}

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        self._where = {"phase": phase, "part": part}
        self._write("begin", {"stage": stage, "stages": stages, "steps": steps})

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._write("step", {"step": step, **values})

    def end(self, values: Mapping[str, float]) -> None:
        self._write("end", values)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        if self._failed:
            return
        line = {"event": event, "time": round(self._clock(), 3), **self._where, **values}
        # NaN and infinity, which JSON doesn't have
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8", buffering=1)  # whole lines, whenever it is killed
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._failed = True
            warn([f"{self.path}: no more steps are written: {error.strerror or error}"])


class Several:
    """Observers that are told the same."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        for observer in self.observers:
            observer.begin(phase, part, stage, stages, steps)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        for observer in self.observers:
            observer.step(step, values)

    def end(self, values: Mapping[str, float]) -> None:
        for observer in self.observers:
            observer.end(values)

    def close(self) -> None:
        for observer in self.observers:
            observer.close()
