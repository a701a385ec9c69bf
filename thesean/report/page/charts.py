"""Charts as SVG, drawn by hand: colours are the page's, and each has a title and a description for who can't see it.

Lengths are pixels of a chart that fits a phone; y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from thesean.report.page.markup import Names, element, words

_WIDTH, _HEIGHT = 340.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 14.0, 40.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """`kind` is "main", "quiet" or "hollow"; `dots` marks each point. `marked` is the index of a point that stands out,
    `named` those whose labels stand beside them; the others are told where the pointer rests."""

    name: str
    points: Points
    kind: str = "main"
    dots: bool = False
    joined: bool = True
    marked: int | None = None
    labels: Sequence[str] = ()
    named: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Axes:
    x: str
    y: str
    whole: bool = True  # x counts something


def chart(names: Names, title: str, told: str, axes: Axes, lines: Sequence[Line]) -> str:
    """Lines or points over two axes. Values that are not finite are left out."""
    points = [p for line in lines for p in line.points if all(map(math.isfinite, p))]
    if not points:
        return ""
    x_low, x_high = _range([x for x, _ in points], axes.whole)
    y_low, y_high = _range([y for _, y in points], False)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = []
    for value, label in _labelled(_ticks(y_low, y_high)):
        y = at((x_low, value))[1]
        drawn.append(_stroke((_LEFT, y), (_WIDTH - _RIGHT, y), "grid"))
        drawn.append(_text(_LEFT - 6, y + 4, label, "end"))
    for value, label in _labelled(_ticks(x_low, x_high, whole=axes.whole)):
        drawn.append(_text(at((value, y_low))[0], _HEIGHT - _BOTTOM + 16, label, "middle"))
    drawn.append(_stroke((_LEFT, _HEIGHT - _BOTTOM), (_WIDTH - _RIGHT, _HEIGHT - _BOTTOM), "axis"))
    drawn.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, axes.x, "middle"))
    for line in lines:
        drawn.extend(_line(line, at))
    return _svg(names, title, told, _WIDTH, _HEIGHT, drawn)


def heatmap(names: Names, title: str, told: str, matrix: Sequence[Sequence[float]]) -> str:
    """Values in [0, 1], rows and columns numbered from 1; small ones have their values inside."""
    rows, columns = len(matrix), len(matrix[0])
    side = min(44.0, (_WIDTH - 40) / columns)
    printed = side >= 30
    drawn = []
    for j in range(columns):
        if side >= 16 or j % 5 == 4 or j == 0:
            drawn.append(_text(30 + (j + 0.5) * side, 16, str(j + 1), "middle"))
    for i, row in enumerate(matrix):
        y = 24 + i * side
        if side >= 14 or i % 5 == 4 or i == 0:
            drawn.append(_text(22, y + side / 2 + 4, str(i + 1), "end"))
        for j, value in enumerate(row):
            known = math.isfinite(value)
            # ink on it stays readable in both themes: hence never the whole of the accent
            strength = max(0.0, min(1.0, value)) * 0.62 if known else 0.0
            x = 30 + j * side
            drawn.append(
                element(
                    "rect", "", class_="cell" if known else "cell unknown", x=_px(x + 0.5), y=_px(y + 0.5),
                    width=_px(side - 1), height=_px(side - 1), fill_opacity=f"{strength:.3f}",
                )
            )  # fmt: skip
            if printed:
                drawn.append(_text(x + side / 2, y + side / 2 + 4, f"{value:.2f}" if known else "-", "middle", "ink"))
    return _svg(names, title, told, max(200.0, 34 + columns * side), 28 + rows * side, drawn)


def _line(line: Line, at: Callable[[tuple[float, float]], tuple[float, float]]) -> list[str]:
    places = [(i, *at(p)) for i, p in enumerate(line.points) if all(map(math.isfinite, p))]
    drawn = []
    if line.joined and len(places) > 1:
        path = " ".join(f"{_px(x)},{_px(y)}" for _, x, y in places)
        drawn.append(element("polyline", "", class_=f"line {line.kind}", points=path))
    for i, x, y in places:
        marked = i == line.marked
        if line.dots or marked or len(places) == 1:
            hint = element("title", words(line.labels[i])) if i < len(line.labels) else ""
            kind = f"dot {line.kind}" + (" marked" if marked else "")
            if i in line.named:
                left = x > _WIDTH / 2
                drawn.append(_text(x + (-10 if left else 10), y + 4, line.labels[i], "end" if left else "start", "ink"))
            drawn.append(element("circle", hint, class_=kind, cx=_px(x), cy=_px(y), r=6 if marked else 3.5))
    return drawn


def _svg(names: Names, title: str, told: str, width: float, height: float, drawn: Sequence[str]) -> str:
    title_id, told_id = names.new("title"), names.new("told")
    head = element("title", words(title), id=title_id) + element("desc", words(told), id=told_id)
    size = f"0 0 {_px(width)} {_px(height)}"
    return element(
        "svg", head + "".join(drawn), role="img", aria_labelledby=f"{title_id} {told_id}", viewBox=size,
        style=f"max-width:{_px(width * 1.15)}px",
    )  # fmt: skip


def _range(values: Sequence[float], whole: bool) -> tuple[float, float]:
    """From the least to the largest, with room around, and never empty."""
    low, high = min(values), max(values)
    if low == high:
        room = 0.5 if whole else abs(high) * 0.1 or 1.0
    else:
        room = 0.0 if whole else 0.08 * (high - low)
    return low - room, high + room


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    step = max(1, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """With as many places as tell neighbours apart, and one prefix for all."""
    largest = max(map(abs, values), default=0.0)
    size, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= s), (1.0, ""))
    size = 1e3 if prefix == "k" else size
    step = min((b - a for a, b in pairwise(values)), default=largest or 1.0) / size
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(value, f"{value / size:.{places}f}{prefix if value else ''}") for value in values]


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> str:
    return element("text", words(text), x=_px(x), y=_px(y), text_anchor=anchor, class_=kind)


def _stroke(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    (x1, y1), (x2, y2) = start, end
    return element("line", "", class_=kind, x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2))


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
