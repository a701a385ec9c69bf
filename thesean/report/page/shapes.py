"""What charts are made of, as SVG: strokes, spots and words, whose colours go by their kind.

Lengths are pixels; y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thesean.report.page.markup import element, words

SIZE = 11.5  # of the words
_CHARACTER = 0.56  # of their size, about: the widest of the usual fonts

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """Straight from point to point. `kind` is "grid" or "axis", or a series': "main", "quiet"."""

    points: Sequence[Point]
    kind: str

    @property
    def is_series(self) -> bool:
        return self.kind not in ("grid", "axis")

    def svg(self) -> str:
        if self.is_series:
            path = " ".join(f"{px(x)},{px(y)}" for x, y in self.points)
            return element("polyline", "", class_=f"line {self.kind}", points=path)
        (x1, y1), (x2, y2) = self.points
        return element("line", "", class_=self.kind, x1=px(x1), y1=px(y1), x2=px(x2), y2=px(y2))


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A point of a series, `marked` where it stands out; `hint` is shown where the pointer rests."""

    x: float
    y: float
    kind: str
    marked: bool = False
    square: bool = False
    hint: str = ""

    @property
    def radius(self) -> float:
        return 6 if self.marked else 3.5

    def svg(self) -> str:
        hint = element("title", words(self.hint)) if self.hint else ""
        kind = f"dot {self.kind}" + (" marked" if self.marked else "")
        r = self.radius
        if self.square:
            side = {"x": px(self.x - r), "y": px(self.y - r), "width": px(2 * r), "height": px(2 * r)}
            return element("rect", hint, class_=kind, **side)
        return element("circle", hint, class_=kind, cx=px(self.x), cy=px(self.y), r=px(r))


@dataclass(frozen=True, kw_only=True)
class Words:
    """`anchor` is "start", "middle" or "end" at x; y is the line that letters stand on. `kind` is "ink", "label", which
    stands out from what is below it, or None.
    """

    x: float
    y: float
    text: str
    anchor: str = "start"
    kind: str | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, about."""
        width = len(self.text) * SIZE * _CHARACTER
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - 0.8 * SIZE, left + width, self.y + 0.2 * SIZE

    def svg(self) -> str:
        return element("text", words(self.text), x=px(self.x), y=px(self.y), text_anchor=self.anchor, class_=self.kind)


Shape = Stroke | Spot | Words


def px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
