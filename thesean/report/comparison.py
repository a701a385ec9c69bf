"""Layer x layer similarity of two networks, as a table, JSON and a heatmap.

L layers of one network, M of the other
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from thesean.errors import DataError, MissingExtraError
from thesean.scratch import named
from thesean.write_file import new_file, write_text

_COLUMNS = 120  # of a terminal: wider tables number their columns
_ANNOTATED = 16  # layers a side up to which a heatmap prints its values


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What `thesean.compare` found. `matrix` is (L, M), in float64, NaN where a layer's output does not vary.

    `estimator` says how batches became one figure, `examples` how many rows they had, `skipped` how many rows came in
    batches too small to count.
    """

    measure: str
    estimator: str
    name_a: str
    name_b: str
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    matrix: torch.Tensor
    examples: int
    skipped: int = 0

    def __str__(self) -> str:
        cells = [[_number(v) for v in row] for row in self.matrix.tolist()]
        first = max(map(len, self.layers_a))
        heads: tuple[str, ...] = self.layers_b
        legend = []
        if first + sum(2 + max(5, len(h)) for h in heads) > _COLUMNS:
            heads = tuple(f"[{i}]" for i in range(len(heads)))
            legend = ["", *(f"{h} {name}" for h, name in zip(heads, self.layers_b, strict=True))]
        widths = [max(5, len(h)) for h in heads]
        lines = [
            f"{self.measure}, {self.estimator}: {self.name_a} (rows) and {self.name_b} (columns), "
            f"{self.examples} examples" + (f", {self.skipped} in batches too small to count" if self.skipped else ""),
            " " * first + "".join(f"  {h:>{w}}" for h, w in zip(heads, widths, strict=True)),
        ]
        for layer, row in zip(self.layers_a, cells, strict=True):
            lines.append(f"{layer:<{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(row, widths, strict=True)))
        return "\n".join(lines + legend)

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything; NaN becomes null. Raises WriteError."""
        rows = [[v if math.isfinite(v) else None for v in row] for row in self.matrix.tolist()]
        values = {
            "measure": self.measure,
            "estimator": self.estimator,
            "models": [self.name_a, self.name_b],
            "layers_a": self.layers_a,
            "layers_b": self.layers_b,
            "matrix": rows,
            "examples": self.examples,
            "skipped": self.skipped,
        }
        return write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """A heatmap, in the format that the file's name ends in. Raises MissingExtraError without matplotlib, DataError
        for a format that it doesn't know, WriteError.
        """
        path = check_plot(path)
        from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display

        rows, columns = self.matrix.shape
        figure = Figure(figsize=(3.2 + 0.5 * columns, 2.2 + 0.4 * rows), layout="constrained")
        axes = figure.add_subplot()
        finite = self.matrix[self.matrix.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
        if high <= 1:  # similarities share one scale, so that two heatmaps can be compared
            low, high = min(low, 0.0), 1.0
        image = axes.imshow(self.matrix.numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_xticks(range(columns), self.layers_b, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(rows), self.layers_a)
        axes.set_xlabel(self.name_b)
        axes.set_ylabel(self.name_a)
        axes.set_title(f"{self.measure}, {self.examples} examples", fontsize="medium")
        if max(rows, columns) <= _ANNOTATED:
            for i, row in enumerate(self.matrix.tolist()):
                for j, value in enumerate(row):
                    dark = math.isfinite(value) and value < (low + 0.6 * (high - low))
                    colour = "white" if dark else "black"
                    axes.text(j, i, _number(value, 2), ha="center", va="center", color=colour, fontsize="small")
        figure.colorbar(image, ax=axes, label=self.measure)
        with new_file(path) as made:
            figure.savefig(made, dpi=150)
        return path


def check_plot(path: str | os.PathLike[str]) -> Path:
    """Whether a heatmap can be drawn there, before anything is computed for it. Raises MissingExtraError, DataError."""
    path = named(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report") from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise DataError(f"plot {path}: expected a name that ends in one of {', '.join(sorted(known))}.")
    return path


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
