"""Charts as SVG, drawn by hand: colours are the page's, and each has a title and a description for who can't see it.

Lengths are pixels of a chart that fits a phone; y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from thesean.report.page.markup import Names, element, words
from thesean.report.page.shapes import Point, Shape, Spot, Stroke, Words, px

WIDTH, HEIGHT = 340.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 14.0, 40.0

_MOST = 1e30  # a loss beyond has run away, and would hide all others
_WIDE = 8.0  # times: an axis of logarithms begins to tell more there

Points = Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Line:
    """`kind` is "main", "quiet", "hollow" or "guide"; `dots` marks each point, `squares` as squares. `marked` is the
    index of a point that stands out, `named` those whose labels stand beside them as far as there is room, the most
    wanted first; with `shy` only where they cover no other point. The others are told where the pointer rests.
    """

    name: str
    points: Points
    kind: str = "main"
    dots: bool = False
    squares: bool = False
    joined: bool = True
    marked: int | None = None
    labels: Sequence[str] = ()
    named: Sequence[int] = ()
    shy: bool = False


@dataclass(frozen=True, kw_only=True)
class Axes:
    x: str
    y: str
    whole: bool = True  # x counts something
    ratios: bool = False  # of x matter, not differences: logarithms, where the largest is many times the least
    height: float = HEIGHT  # of the chart


def chart(names: Names, title: str, told: str, axes: Axes, lines: Sequence[Line]) -> str:
    """Lines or points over two axes. Values that are not finite, or beyond all sense, are left out."""
    drawn = [shape.svg() for shape in plotted(axes, lines)]
    return _svg(names, title, told, WIDTH, axes.height, drawn) if drawn else ""


def plotted(axes: Axes, lines: Sequence[Line]) -> list[Shape]:
    """A chart's shapes, on a plane of WIDTH and the axes' height; none where no value is finite."""
    bottom = axes.height - _BOTTOM
    points = [p for line in lines for p in line.points if _can_be_drawn(p)]
    if not points:
        return []
    xs = [x for x, _ in points]
    bent = axes.ratios and min(xs) > 0 and max(xs) >= _WIDE * min(xs)
    along = math.log10 if bent else float
    x_low, x_high = _range([along(x) for x in xs], axes.whole)
    y_low, y_high = _range([y for _, y in points], False)
    levels = _labelled(_ticks(y_low, y_high))
    left = max(_LEFT, 12 + max((Words(x=0, y=0, text=label).box[2] for _, label in levels), default=0.0))

    def at(point: Point) -> Point:
        x = left + (along(point[0]) - x_low) / (x_high - x_low) * (WIDTH - left - _RIGHT)
        return x, bottom - (point[1] - y_low) / (y_high - y_low) * (bottom - _TOP)

    drawn: list[Shape] = []
    for value, label in levels:
        y = bottom - (value - y_low) / (y_high - y_low) * (bottom - _TOP)
        drawn.append(Stroke(points=((left, y), (WIDTH - _RIGHT, y)), kind="grid"))
        drawn.append(Words(x=left - 6, y=y + 4, text=label, anchor="end"))
    ticks = _ratio_ticks(x_low, x_high) if bent else _labelled(_ticks(x_low, x_high, whole=axes.whole))
    for value, label in ticks:
        x = at((value, y_low))[0]
        drawn.append(Words(x=x, y=bottom + 16, text=label, anchor="middle"))
    drawn.append(Stroke(points=((left, bottom), (WIDTH - _RIGHT, bottom)), kind="axis"))
    drawn.append(Words(x=(left + WIDTH - _RIGHT) / 2, y=axes.height - 6, text=axes.x, anchor="middle"))
    return [*drawn, *_series(lines, at, (left, bottom))]


def heatmap(names: Names, title: str, told: str, matrix: Sequence[Sequence[float]]) -> str:
    """Values in [0, 1], rows and columns numbered from 1; small ones have their values inside."""
    rows, columns = len(matrix), len(matrix[0])
    side = min(44.0, (WIDTH - 40) / columns)
    printed = side >= 30
    drawn = []
    for j in range(columns):
        if side >= 16 or j % 5 == 4 or j == 0:
            drawn.append(Words(x=30 + (j + 0.5) * side, y=16, text=str(j + 1), anchor="middle").svg())
    for i, row in enumerate(matrix):
        y = 24 + i * side
        if side >= 14 or i % 5 == 4 or i == 0:
            drawn.append(Words(x=22, y=y + side / 2 + 4, text=str(i + 1), anchor="end").svg())
        for j, value in enumerate(row):
            known = math.isfinite(value)
            # ink on it stays readable in both themes: hence never the whole of the accent
            strength = max(0.0, min(1.0, value)) * 0.62 if known else 0.0
            x = 30 + j * side
            drawn.append(
                element(
                    "rect", "", class_="cell" if known else "cell unknown", x=px(x + 0.5), y=px(y + 0.5),
                    width=px(side - 1), height=px(side - 1), fill_opacity=f"{strength:.3f}",
                )
            )  # fmt: skip
            if printed:
                number = f"{value:.2f}" if known else "-"
                inside = Words(x=x + side / 2, y=y + side / 2 + 4, text=number, anchor="middle", kind="ink")
                drawn.append(inside.svg())
    return _svg(names, title, told, max(200.0, 34 + columns * side), 28 + rows * side, drawn)


def _series(lines: Sequence[Line], at: Callable[[Point], Point], corner: Point) -> Iterator[Shape]:
    """Strokes below spots, and labels above all, so that each can be read."""
    spots: list[Spot] = []
    wanted: list[tuple[Spot, str, bool]] = []
    for line in lines:
        places = [(i, *at(p)) for i, p in enumerate(line.points) if _can_be_drawn(p)]
        if line.joined and len(places) > 1:
            yield Stroke(points=tuple((x, y) for _, x, y in places), kind=line.kind)
        of_line = {}
        for i, x, y in places:
            marked = i == line.marked
            if line.dots or marked or len(places) == 1:
                hint = line.labels[i] if i < len(line.labels) else ""
                of_line[i] = Spot(x=x, y=y, kind=line.kind, marked=marked, square=line.squares, hint=hint)
        spots += of_line.values()
        wanted += [(of_line[i], line.labels[i], line.shy) for i in line.named if i in of_line]
    yield from spots
    placed: list[Words] = []
    for spot, text, shy in wanted:
        others = [other for other in spots if other is not spot]
        free = [w for w in _beside(spot, text, corner) if not any(_overlap(w.box, p.box) for p in placed)]
        covered = {n: sum(_overlap(w.box, _box(s)) for s in others) for n, w in enumerate(free)}
        best = min(covered, key=lambda n: covered[n], default=None)
        if best is not None and not (shy and covered[best]):
            placed.append(free[best])
    yield from placed


def _beside(spot: Spot, text: str, corner: Point) -> list[Words]:
    """Where a label may stand within the chart, the likeliest first. `corner`: where its axes meet."""
    side, other = (("end", -1), ("start", 1)) if spot.x > WIDTH / 2 else (("start", 1), ("end", -1))
    moves = [(10, 4, side), (10, 4, other), *((6, dy, way) for dy in (-9, 16) for way in (side, other))]
    found = [
        Words(x=spot.x + dx * sign, y=spot.y + dy, text=text, anchor=anchor, kind="label")
        for dx, dy, (anchor, sign) in moves
    ]
    left, bottom = corner
    return [w for w in found if w.box[0] >= left and w.box[2] <= WIDTH - 2 and w.box[1] >= 0 and w.box[3] <= bottom]


def _box(spot: Spot) -> tuple[float, float, float, float]:
    r = spot.radius
    return spot.x - r, spot.y - r, spot.x + r, spot.y + r


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(names: Names, title: str, told: str, width: float, height: float, drawn: Sequence[str]) -> str:
    title_id, told_id = names.new("title"), names.new("told")
    head = element("title", words(title), id=title_id) + element("desc", words(told), id=told_id)
    size = f"0 0 {px(width)} {px(height)}"
    return element(
        "svg", head + "".join(drawn), role="img", aria_labelledby=f"{title_id} {told_id}", viewBox=size,
        style=f"max-width:{px(width * 1.15)}px",
    )  # fmt: skip


def _can_be_drawn(point: Point) -> bool:
    return all(math.isfinite(value) and abs(value) < _MOST for value in point)


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
    """With as many places as tell neighbours apart, and one prefix or power of ten for all."""
    largest = max(map(abs, values), default=0.0)
    if 0 < largest < 1e-3 or largest >= 1e13:
        power = math.floor(math.log10(largest))
        return [
            (v, f"{text}e{power}" if v else "0")
            for v, (_, text) in zip(values, _labelled([v / 10.0**power for v in values]), strict=True)
        ]
    size, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= s), (1.0, ""))
    size = 1e3 if prefix == "k" else size
    step = min((b - a for a, b in pairwise(values)), default=largest or 1.0) / size
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return [(value, f"{value / size:.{places}f}{prefix if value else ''}") for value in values]


def _ratio_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """1, 2, 5, 10...: as many of them as are read; bounds are logarithms."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [k * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for k in steps]
        inside = [v for v in values if low <= math.log10(v) <= high]
        if len(inside) <= 7:
            break
    return [(v, f"{v:g}") for v in inside]
