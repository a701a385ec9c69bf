"""A plan as a picture: the guide above, the target below, a box a part; heights tell latency or parameters.

Guide boxes stand on a line and target boxes hang from one, so that what shrinks is seen to shrink. Every box has room
for its words, and grows with its figure from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thesean.passes.plan.rows import PlannedPart, PlanRows
from thesean.passes.plan.svg import CHARACTER, Arrow, Box, Picture, Text, check_format
from thesean.passes.plan.table import place_of, replaced_inside, target_of
from thesean.units import milliseconds, quantity

# Pale fills and their edges, told apart by colour-blind eyes as well (Okabe and Ito 2008)
_COLOURS = (
    ("#cfe3f5", "#0072b2"), ("#fbe0cc", "#d55e00"), ("#cdeee2", "#009e73"), ("#f5dcea", "#b3558a"),
    ("#fbeecb", "#b07d00"), ("#d9f0fb", "#3a94c4"), ("#e6e0f5", "#6a51a3"), ("#e3efcb", "#5f8a00"),
)  # fmt: skip
_KEPT = ("#eeeeee", "#999999")

_MARGIN, _GAP, _BETWEEN = 20.0, 10.0, 34.0  # around the picture, beside a box, from guide to target
_PAD, _LINE, _SIZE = 6.0, 15.0, 11.0
_ROW_WIDTH, _MOST_WIDTH, _LEAST_WIDTH = 1560.0, 250.0, 118.0
_TALLEST = 90.0  # what the largest figure adds to a box's height
_CHARACTER = CHARACTER * _SIZE


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One column: texts above and below, the figures that heights tell, and the colours."""

    path: str
    above: tuple[str, ...]
    below: tuple[str, ...]
    before: float
    after: float
    family: str | None  # None where the guide's own stays


def draw(plan: PlanRows, path: Path) -> Path:
    """Write the picture in the format that the name ends in. Raises PlanError, MissingExtraError."""
    check_format(path)
    return picture_of(plan).write(path)


def picture_of(plan: PlanRows) -> Picture:
    """The picture of a plan; long plans wrap to rows."""
    cells = [*(_cell(p, _timed(plan)) for p in plan), *_rest(plan)]
    longest = max(len(line) for c in cells for line in (*c.above, *c.below))
    width = min(_MOST_WIDTH, max(_LEAST_WIDTH, longest * _CHARACTER + 2 * _PAD))
    per_row = max(1, int((_ROW_WIDTH + _GAP) // (width + _GAP)))
    families = list(dict.fromkeys(c.family for c in cells if c.family is not None))
    canvas = _Canvas(
        width=width,
        most=max(max(c.before, c.after) for c in cells) or 1.0,
        colours={name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(families)},
    )
    title = f"{len(plan.replaced)} of {len(plan)} parts replaced: {_change(plan)}"
    canvas.texts.append(Text(x=_MARGIN, y=_MARGIN + 12, words=title, size=14, bold=True, centred=False))
    y = canvas.legend(plan, any(c.family is None for c in cells), _MARGIN + 24)
    for start in range(0, len(cells), per_row):
        y = canvas.row(cells[start : start + per_row], y)
    full = _MARGIN * 2 + min(per_row, len(cells)) * (width + _GAP) - _GAP
    full = max(full, *(t.x + t.width + _MARGIN for t in canvas.texts if not t.centred))
    return Picture(
        width=full,
        height=y,
        boxes=tuple(canvas.boxes),
        texts=tuple(canvas.texts),
        arrows=tuple(canvas.arrows),
        title=title,
    )


@dataclass(kw_only=True)
class _Canvas:
    """What is drawn so far. `width` of a column, `most` the largest figure, `colours` by target."""

    width: float
    most: float
    colours: dict[str, tuple[str, str]]
    boxes: list[Box] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)

    def row(self, cells: Sequence[_Cell], top: float) -> float:
        """Add one row of columns below `top`; returns where the next one begins."""
        fits = int((self.width - 2 * _PAD) / _CHARACTER)
        above, below = (
            [_wrapped(words, fits) for words in side] for side in ([c.above for c in cells], [c.below for c in cells])
        )
        lines = max(len(words) for words in (*above, *below))
        least = lines * _LINE + 2 * _PAD
        base = top + least + max(c.before for c in cells) / self.most * _TALLEST
        hang = base + _BETWEEN
        for index, cell in enumerate(cells):
            x = _MARGIN + index * (self.width + _GAP)
            fill, edge = _KEPT if cell.family is None else self.colours[cell.family]
            before = least + cell.before / self.most * _TALLEST
            after = least + cell.after / self.most * _TALLEST
            grey = _KEPT if cell.family is None else ("#ffffff", edge)
            hint = cell.path
            self.boxes.append(
                Box(x=x, y=base - before, width=self.width, height=before, fill=grey[0], edge=grey[1], hint=hint)
            )
            self.boxes.append(Box(x=x, y=hang, width=self.width, height=after, fill=fill, edge=edge, hint=hint))
            self.arrows.append(Arrow(x=x + self.width / 2, y=base, end=hang))
            first = base - _PAD - len(above[index]) * _LINE + _SIZE
            self.texts.extend(_lines(above[index], x + self.width / 2, first))
            self.texts.extend(_lines(below[index], x + self.width / 2, hang + _PAD + _SIZE))
        return hang + least + max(c.after for c in cells) / self.most * _TALLEST + _MARGIN

    def legend(self, plan: PlanRows, kept: bool, y: float) -> float:
        """Colours by target and what heights mean; returns where the rows begin."""
        x = _MARGIN
        entries = [*self.colours.items(), *([("kept", _KEPT)] if kept else [])]
        for name, (fill, edge) in entries:
            text = Text(x=x + 18, y=y + 11, words=name, size=_SIZE, centred=False)
            if x > _MARGIN and text.x + text.width > _ROW_WIDTH:
                x, y = _MARGIN, y + 20
                text = Text(x=x + 18, y=y + 11, words=name, size=_SIZE, centred=False)
            self.boxes.append(Box(x=x, y=y, width=12, height=12, fill=fill, edge=edge))
            self.texts.append(text)
            x = text.x + text.width + 18
        timed = _timed(plan)
        figure = f"milliseconds ({place_of(plan.latencies[0])})" if timed else "parameters"
        told = f"guide above, target below; the taller, the more {figure}" + (
            "; the rest has no scale" if _rest(plan) else ""
        )
        self.texts.append(Text(x=_MARGIN, y=y + 31, words=told, size=_SIZE, centred=False))
        return y + 48


def _lines(words: Sequence[tuple[str, bool]], x: float, y: float) -> list[Text]:
    """Texts under each other."""
    return [Text(x=x, y=y + i * _LINE, words=line, size=_SIZE, bold=bold) for i, (line, bold) in enumerate(words)]


def _wrapped(words: Sequence[str], fits: int) -> list[tuple[str, bool]]:
    """Lines of at most `fits` characters, broken after a dot or a space where there is one; the first word is bold."""
    found = []
    for index, line in enumerate(words):
        left = line
        while len(left) > fits:
            at = max(left.rfind(mark, fits // 2, fits) for mark in ". ") + 1 or fits
            found.append((left[:at].rstrip(), not index))
            left = left[at:]
        found.append((left, not index))
    return found


def _timed(plan: PlanRows) -> bool:
    return bool(plan.latencies) and any(p.latency_ms is not None for p in plan)


def _cell(part: PlannedPart, timed: bool) -> _Cell:
    above = [part.path, part.operators, *_figures(part.params, part.flops, part.latency_ms)]
    if part.kept:
        below, after, ms = ["kept"], part.params, part.latency_ms
    else:
        figures = _figures(part.new_params, part.new_flops, part.new_latency_ms)
        below = [target_of(part), *filter(None, [replaced_inside(part)]), *figures]
        after, ms = part.new_params, part.new_latency_ms
    return _Cell(
        path=part.path,
        above=tuple(line for line in above if line),
        below=tuple(below),
        before=(part.latency_ms or 0.0) if timed else part.params,
        after=(ms or 0.0) if timed else after,
        family=None if part.kept else part.target,
    )


def _rest(plan: PlanRows) -> list[_Cell]:
    """What no part covers: embeddings, a stem, a head. Parameters that parts share may leave nothing to tell."""
    params, flops = plan.params - sum(p.params for p in plan), plan.flops - sum(p.flops for p in plan)
    if params <= 0 and flops <= 0:
        return []
    above = ("the rest", *_figures(max(params, 0), max(flops, 0), None))
    # its latency is not measured by itself, and its parameters would dwarf the parts'
    return [_Cell(path="the rest", above=above, below=("kept",), before=0.0, after=0.0, family=None)]


def _figures(params: int, flops: int, ms: float | None) -> list[str]:
    return [f"{quantity(params)} params", f"{quantity(flops)} FLOPs", *([] if ms is None else [milliseconds(ms)])]


def _change(plan: PlanRows) -> str:
    told = [f"{quantity(plan.params)} -> {quantity(plan.new_params)} params"]
    told.append(f"{quantity(plan.flops)} -> {quantity(plan.new_flops)} FLOPs")
    first = plan.latencies[0] if plan.latencies else None
    if first is not None and first.guide_ms is not None and first.plan_ms is not None:
        told.append(f"{first.guide_ms:.3g} -> {first.plan_ms:.3g} ms {place_of(first)}")
    return ", ".join(told)
