"""Figures as people read them: 1.2 M, 3.4 GFLOP, 850 kB, 12 ms."""

from __future__ import annotations

import math

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MISSING = "-"


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: 842_240 -> "842 k", 1.5e9 with "FLOP" -> "1.5 GFLOP"."""
    if value is None or not math.isfinite(value):
        return MISSING
    for step, (size, prefix) in enumerate(_PREFIXES):
        if abs(value) >= size:
            if round(abs(value) / size) >= 1000 and step:  # 999_999 is 1 M, not 1000 k
                size, prefix = _PREFIXES[step - 1]
            return f"{_three_digits(value / size)} {prefix}{unit}"
    return f"{_three_digits(value)} {unit}".rstrip()


def milliseconds(value: float | None) -> str:
    """0.0123 -> "12.3 us", 12.34 -> "12.3 ms", 2500 -> "2.5 s"."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 1000:
        return f"{_three_digits(value / 1000)} s"
    return f"{_three_digits(value)} ms" if value >= 0.1 else f"{_three_digits(value * 1000)} us"


def times(slow: float | None, fast: float | None) -> str:
    """How many times as fast: "1.35x", "120x"; "" where either was not measured."""
    if slow is None or not fast:
        return ""
    return f"{_three_digits(slow / fast)}x"


def duration(seconds: float | None) -> str:
    """4.25 -> "4.2 s", 75 -> "1 min 15 s", 4000 -> "1 h 7 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def decimal(value: float | None, places: int = 4) -> str:
    """A loss or a metric, fixed places so that columns compare."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{places}f}"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
