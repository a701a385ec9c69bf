"""What `thesean.trade_offs` returns: points, as a table, a picture and a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from thesean.errors import DataError
from thesean.report.page.trade_offs import draw, svg
from thesean.report.points import Points
from thesean.scratch import named
from thesean.write_file import write_text


@dataclass(frozen=True, kw_only=True, repr=False)
class TradeOffs(Points):
    """A sequence of points, a file each. `print` it, `draw` it, keep it by `to_json`."""

    def __str__(self) -> str:
        lines = []
        for batch in dict.fromkeys(p[2] for p in self.places) or [None]:
            heads, rows = self.table(batch)
            widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
            lines.append(f"batch {batch}, onnxruntime, one thread, medians; * on the Pareto front of {self.quality}")
            for row in (heads, *rows):
                first, *rest = (
                    f"{c:<{w}}" if not i else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
                )
                lines.append("  ".join([first, *rest]).rstrip())
            lines.append("")
        told = [f"{self.judged}; divergence in {self.unit}", *self.told()]
        return "\n".join([*lines, *told, *(f"note: {note}" for note in self.notes)])

    def told(self) -> Iterator[str]:
        """How tokens are made, where not all points make them alike."""
        again = [p.name for p in self.points if p.token_kind == "recompute"]
        if again and any(p.token_kind == "state" for p in self.points):
            yield f"without a state, a token reads all again: {', '.join(again)}"

    def with_notes(self, notes: Sequence[str]) -> TradeOffs:
        """A copy with these before its own."""
        return replace(self, notes=(*notes, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, but for losses that are no finite number."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything; NaN becomes null. Raises WriteError."""
        text = json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False)
        return write_text(named(path), text + "\n")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TradeOffs:
        """Raises DataError for anything but what `to_dict` gives."""
        try:
            return _adapter().validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"these are no trade-offs: {where}: {first['msg']}.") from error

    @staticmethod
    def from_json(path: str | os.PathLike[str]) -> TradeOffs:
        """What `to_json` wrote. Raises DataError."""
        path = named(path, "read", DataError)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror or error}.") from error
        except ValueError as error:
            raise DataError(f"{path}: expected JSON, found something else ({error}).") from error
        return TradeOffs.from_dict(values)

    def draw(
        self, path: str | os.PathLike[str], batch: int | None = None, lengths: Sequence[int] | None = None
    ) -> Path:
        """Quality against latency, a chart a place, with the Pareto front, as .svg or, with matplotlib, .png.

        batch: by default the first measured. lengths: by default the shortest and the longest. Raises PlanError for
        another ending, DataError for a place that was not measured, MissingExtraError, WriteError.
        """
        return draw(self, named(path), batch, lengths)

    def svg(self, batch: int | None = None, lengths: Sequence[int] | None = None) -> str:
        """The picture as text."""
        return svg(self, batch, lengths)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@cache
def _adapter() -> TypeAdapter[TradeOffs]:
    return TypeAdapter(TradeOffs)
