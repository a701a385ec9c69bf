"""Latencies of whole choices: measured beside the guide's in the same turns, and again until two runs agree."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from thesean.choose.candidates import Candidates, Choice
from thesean.choose.latency import PlanTimer
from thesean.deploy.timing.latency import Timing
from thesean.errors import ExportError

logger = logging.getLogger(__name__)

# Runs of one file that differ by more contradict each other: it is measured once more, up to so many times
_AGREE, _RUNS = 0.1, 4

# What a sum over parts may be off by before it says nothing of the whole: of what the plan changes, and of the guide
_OFF, _OFF_AT_LEAST = 0.25, 0.03


class Timed:
    """Figures are in the clock of the run in which the guide took `guide_ms`: others are scaled by the guide's there,
    since a machine's speed drifts between runs.
    """

    def __init__(self, timer: PlanTimer, candidates: Candidates, guide_ms: float) -> None:
        self.timer, self.candidates, self.guide_ms = timer, candidates, guide_ms
        self.refused = False  # whether anything could not be exported
        self._runs: dict[Choice, list[Timing]] = {}

    def see(self, choices: Sequence[Choice]) -> None:
        """Measure those that were not yet, together. What can't be exported has no latency, with a log line."""
        self._measure([c for c in choices if c not in self._runs])

    def confirm(self, choices: Sequence[Choice]) -> None:
        """Measure all of them once more, and those whose runs contradict each other until most agree."""
        wanted = [c for c in choices if math.isfinite(self.ms(c))]
        for _ in range(_RUNS - 1):
            self._measure(wanted)
            wanted = [c for c in wanted if self.contradicts_itself(c)]
            if not wanted:
                break

    def ms(self, choice: Choice) -> float:
        """The median of its runs' medians; infinite without any."""
        runs = self._runs.get(choice)
        return statistics.median_low([t.median_ms for t in runs]) if runs else math.inf

    def timing(self, choice: Choice) -> Timing | None:
        """The run that `ms` is of."""
        return next((t for t in self._runs.get(choice, ()) if t.median_ms == self.ms(choice)), None)

    def contradicts_itself(self, choice: Choice) -> bool:
        """Whether no two of its runs agree, the last one with any."""
        *before, last = [t.median_ms for t in self._runs[choice]]
        return not any(_near(last, other, _AGREE) for other in before)

    def range_ms(self, choice: Choice) -> tuple[float, float]:
        medians = [t.median_ms for t in self._runs[choice]]
        return min(medians), max(medians)

    @property
    def all_ms(self) -> Mapping[Choice, float]:
        return {choice: self.ms(choice) for choice in self._runs}

    def _measure(self, choices: Sequence[Choice]) -> None:
        bound_plans, measured = [], []
        for choice in choices:
            self._runs.setdefault(choice, [])
            bound_plan = self.candidates.bind(choice)
            try:
                self.timer.export(bound_plan)
            except ExportError as error:
                logger.warning("a plan is left out: %s", error)
                self.refused = True
                continue
            bound_plans.append(bound_plan)
            measured.append(choice)
        if not measured:
            return
        guide, found = self.timer.measure(bound_plans)
        for choice, timing in zip(measured, found, strict=True):
            if timing is not None:
                self._runs[choice].append(_scaled(timing, self.guide_ms / guide.median_ms))


def sum_agrees(said_ms: float, measured_ms: float, guide_ms: float) -> bool:
    """Whether a sum over parts may stand beside what was measured."""
    return said_ms > 0 and abs(said_ms - measured_ms) <= max(
        _OFF * abs(guide_ms - measured_ms), _OFF_AT_LEAST * guide_ms
    )


def _near(a: float, b: float, share: float) -> bool:
    return max(a, b) <= (1 + share) * min(a, b)


def _scaled(timing: Timing, factor: float) -> Timing:
    return replace(
        timing, median_ms=timing.median_ms * factor, p20_ms=timing.p20_ms * factor, p80_ms=timing.p80_ms * factor
    )
