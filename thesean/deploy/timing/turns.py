"""Calls in turns, timed: a busy machine slows all alike."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_WARM_UP = 2
_TURN_MS, _MOST = 3.0, 50
_LEAST = 5  # repeats below which a median says little, whatever they cost
_LONG_MS = 200.0  # a call that takes this long has warmed itself up


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of a run over `repeats` turns: the median and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


def measure(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 20,
    seconds: float = 5.0,
    least: int = _LEAST,
    settle: float | None = None,
) -> dict[str, Timing]:
    """Time each call in `repeats` turns; fewer, but at least `least`, when `seconds` are over for all together.

    With `settle` there are as many turns as the medians need to be known to that share of them, `repeats` or not, as
    long as `seconds` last.

    A turn of a short call is one that isn't timed, since the others' weights fill the cache, and then as many as take
    3 ms: a decoder calls one model again and again (0.14 ms a step; 0.5 ms where three models alternate).
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    rows: dict[str, int] = {}
    for name, call in calls.items():
        for _ in range(_WARM_UP):
            start = time.perf_counter()
            call()
            once_ms = (time.perf_counter() - start) * 1e3
            if once_ms > _LONG_MS:
                break
        rows[name] = max(1, min(_MOST, round(_TURN_MS / max(once_ms, 1e-6))))
    end = time.perf_counter() + seconds
    for done in itertools.count():
        known = settle is not None and all(doubt(values) <= settle for values in taken.values())
        if (settle is None and done >= repeats) or (done >= least and (known or time.perf_counter() > end)):
            break
        for name, call in calls.items():
            if rows[name] > 1:  # a call of milliseconds fills the cache by itself
                call()
            start = time.perf_counter()
            for _ in range(rows[name]):
                call()
            taken[name].append((time.perf_counter() - start) * 1e3 / rows[name])
    return {name: _summary(values) for name, values in taken.items()}


def doubt(values: Sequence[float]) -> float:
    """By what share of it the true median may be off: half of the interval between order statistics that holds it nine
    times in ten, whatever the distribution (David and Nagaraja 2003, section 7.1).
    """
    if not values:
        return math.inf
    ordered, middle = sorted(values), len(values) // 2
    off = math.ceil(0.82 * math.sqrt(len(values)))
    low, high = ordered[max(0, middle - off)], ordered[min(len(values) - 1, middle + off)]
    return (high - low) / 2 / max(ordered[middle], 1e-12)


def _summary(values: list[float]) -> Timing:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return Timing(median_ms=float(median), p20_ms=float(p20), p80_ms=float(p80), repeats=len(values))
