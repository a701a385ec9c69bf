"""Charts below each other as a file of their own: SVG that knows light and dark, or PNG, by matplotlib, in light.

Lengths are pixels; y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thesean.passes.plan.svg import check_format
from thesean.report.page.charts import WIDTH, Axes, Line, plotted
from thesean.report.page.markup import element, words
from thesean.report.page.shapes import SIZE, Shape, Spot, Stroke, Words, px
from thesean.report.page.style import COLOURS, FIGURES, LIGHT
from thesean.write_file import new_file, write_text

_HEAD, _GAP = 22.0, 14.0  # above a chart, for its title, and below it
_MARGIN = 12.0
_LINE = 16.0
_FITS = 58  # letters in a line of the width


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    axes: Axes
    lines: Sequence[Line]


def write_charts(path: Path, title: str, told: Sequence[str], panels: Sequence[Panel]) -> Path:
    """In the format that the name ends in; `told` stands below the title, a line each where it fits. Raises PlanError
    for an unknown format, MissingExtraError, WriteError.
    """
    check_format(path)
    if path.suffix.lower() == ".svg":
        return write_text(path, charts_as_svg(title, told, panels))
    with new_file(path) as made:
        _png(made, *_placed(title, told, panels))
    return path


Placed = list[tuple[float, Sequence[Shape]]]  # with what to add to y


def _placed(title: str, told: Sequence[str], panels: Sequence[Panel]) -> tuple[Placed, float]:
    y = _MARGIN + _LINE
    head: list[Shape] = []
    for kind, text in (("ink", title), *((None, line) for line in told)):
        for line in _wrapped(text):
            head.append(Words(x=_MARGIN, y=y, text=line, kind=kind))
            y += _LINE
    placed: Placed = [(0.0, head)]
    for panel in panels:
        y += _GAP
        placed.append((y, [Words(x=_MARGIN, y=_LINE, text=panel.title, kind="ink")]))
        placed.append((y + _HEAD, plotted(panel.axes, panel.lines)))
        y += _HEAD + panel.axes.height
    return placed, y + _MARGIN


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _FITS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def charts_as_svg(title: str, told: Sequence[str], panels: Sequence[Panel]) -> str:
    """The file's text: well formed, without scripts or references."""
    placed, height = _placed(title, told, panels)
    groups = (element("g", "".join(s.svg() for s in shapes), transform=f"translate(0,{px(y)})") for y, shapes in placed)
    head = element("title", words(title)) + element("desc", words(" ".join(told)))
    ground = element("rect", "", width=px(WIDTH), height=px(height), style="fill:var(--ground)")
    size = {"viewBox": f"0 0 {px(WIDTH)} {px(height)}", "width": px(1.4 * WIDTH), "height": px(1.4 * height)}
    style = element("style", COLOURS + FIGURES)
    body = head + style + ground + "".join(groups)
    return element("svg", body, xmlns="http://www.w3.org/2000/svg", role="img", **size) + "\n"


def _png(path: Path, placed: Placed, height: float) -> None:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display

    inch = 72.0  # so that a font's size in points is one in pixels
    figure = Figure(figsize=(WIDTH / inch, height / inch), facecolor=LIGHT["ground"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    for y, shapes in placed:
        for shape in shapes:
            _paint(axes, shape, y)
    figure.savefig(path, dpi=3 * inch)


def _paint(axes: Any, shape: Shape, down: float) -> None:
    """As the style sheet has it, in its light colours."""
    from matplotlib.patheffects import withStroke

    if isinstance(shape, Words):
        align = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        text = shape.text.replace("$", r"\$")
        look: dict[str, Any] = {"color": LIGHT["ink" if shape.kind else "muted"], "ha": align, "va": "baseline"}
        if shape.kind == "label":
            look["path_effects"] = [withStroke(linewidth=3, foreground=LIGHT["ground"])]
        axes.text(shape.x, shape.y + down, text, fontsize=0.94 * SIZE, zorder=3, **look)
    elif isinstance(shape, Stroke):
        colour = LIGHT[{"grid": "rule", "main": "accent"}.get(shape.kind, "muted")]
        look = {"linewidth": 2.0 if shape.kind == "main" else 1.0}
        look |= {"dashes": (4, 3)} if shape.kind == "quiet" else {}
        axes.plot([x for x, _ in shape.points], [y + down for _, y in shape.points], color=colour, zorder=1, **look)
    elif isinstance(shape, Spot):
        fill = {"main": "accent", "guide": "ink", "quiet": "muted"}.get(shape.kind, "ground")
        edge, width = ("muted" if shape.kind == "hollow" else "ground"), 1.5
        if shape.marked:
            fill, edge, width = "ground", "accent", 3.0
        look = {"color": LIGHT[fill], "markeredgecolor": LIGHT[edge], "markeredgewidth": width}
        mark = "s" if shape.square else "o"
        axes.plot([shape.x], [shape.y + down], mark, markersize=2 * shape.radius, zorder=2, **look)
