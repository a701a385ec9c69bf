"""Boxes, lines and texts on a plane, written as SVG by hand or, with matplotlib, as PNG.

Lengths are pixels; y grows downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from thesean.errors import MissingExtraError, PlanError
from thesean.write_file import new_file, write_text

# Of the font's size, for any monospaced font: the width of a text is known before it is drawn
CHARACTER = 0.602
_FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"


@dataclass(frozen=True, kw_only=True)
class Box:
    """`hint` is shown when the pointer rests on it."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    edge: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """`x` is the middle, or the left end; `y` the baseline."""

    x: float
    y: float
    words: str
    size: float = 11
    bold: bool = False
    centred: bool = True

    @property
    def width(self) -> float:
        return len(self.words) * self.size * CHARACTER


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """Straight down from (x, y) to (x, end)."""

    x: float
    y: float
    end: float


def check_format(path: Path) -> None:
    """Raises PlanError unless the name ends in a format that can be written, MissingExtraError without its writer."""
    if path.suffix.lower() == ".png":
        require_matplotlib()
    if path.suffix.lower() not in (".svg", ".png"):
        found = repr(path.suffix) if path.suffix else "no ending"
        raise PlanError(f"draw {path}: expected a name that ends in .svg or .png, found {found}.")


def require_matplotlib() -> None:
    """Raises MissingExtraError without it: before anything is computed for a picture, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report") from error


@dataclass(frozen=True, kw_only=True)
class Picture:
    width: float
    height: float
    boxes: tuple[Box, ...]
    texts: tuple[Text, ...]
    arrows: tuple[Arrow, ...]
    title: str

    def write(self, path: Path) -> Path:
        """In the format that the name ends in. Raises PlanError for an unknown one, WriteError."""
        check_format(path)
        if path.suffix.lower() == ".svg":
            return write_text(path, self.svg())
        with new_file(path) as made:
            self._png(made)
        return path

    def svg(self) -> str:
        """Well-formed SVG 1.1 without scripts or references."""
        size = {"width": _px(self.width), "height": _px(self.height)}
        root = ElementTree.Element(
            "svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {size['width']} {size['height']}", **size}
        )
        ElementTree.SubElement(root, "title").text = self.title
        ElementTree.SubElement(root, "rect", {"fill": "white", **size})
        for arrow in self.arrows:
            ends = {"x1": arrow.x, "y1": arrow.y, "x2": arrow.x, "y2": arrow.end - 4}
            ElementTree.SubElement(root, "line", {**{k: _px(v) for k, v in ends.items()}, "stroke": _GREY})
            tip = [(arrow.x - 4, arrow.end - 6), (arrow.x + 4, arrow.end - 6), (arrow.x, arrow.end)]
            ElementTree.SubElement(root, "polygon", points=" ".join(f"{_px(x)},{_px(y)}" for x, y in tip), fill=_GREY)
        for box in self.boxes:
            sides = {"x": box.x, "y": box.y, "width": box.width, "height": box.height}
            drawn = ElementTree.SubElement(
                root, "rect", {**{k: _px(v) for k, v in sides.items()}, "rx": "3", "fill": box.fill, "stroke": box.edge}
            )
            if box.hint:
                ElementTree.SubElement(drawn, "title").text = box.hint
        letters = ElementTree.SubElement(root, "g", {"font-family": _FONT, "fill": "#222222"})
        for text in self.texts:
            look = {"x": _px(text.x), "y": _px(text.y), "font-size": _px(text.size)}
            look |= {"text-anchor": "middle"} if text.centred else {}
            look |= {"font-weight": "bold"} if text.bold else {}
            ElementTree.SubElement(letters, "text", look).text = text.words
        ElementTree.indent(root, " ")
        return ElementTree.tostring(root, encoding="unicode") + "\n"

    def _png(self, path: Path) -> None:
        from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display
        from matplotlib.patches import Rectangle

        inch = 72.0  # so that a font's size in points is one in pixels
        figure = Figure(figsize=(self.width / inch, self.height / inch))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.set_axis_off()
        for arrow in self.arrows:
            shaft = {"arrowstyle": "-|>", "color": _GREY, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (arrow.x, arrow.end), (arrow.x, arrow.y), arrowprops=shaft)
        for box in self.boxes:
            axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=box.fill, edgecolor=box.edge))
        for text in self.texts:
            axes.text(
                text.x,
                text.y,
                text.words.replace("$", r"\$"),
                fontsize=text.size,
                family="monospace",
                weight="bold" if text.bold else "normal",
                ha="center" if text.centred else "left",
                va="baseline",
                color="#222222",
            )
        figure.savefig(path, dpi=2 * inch)


_GREY = "#888888"


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
