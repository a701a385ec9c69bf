"""What a conversion cost and what it did to the network, stage by stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter

from thesean.curve import Curve
from thesean.errors import DataError

if TYPE_CHECKING:
    from thesean.report.answers import Answers
    from thesean.report.trade_offs import TradeOffs

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """The hybrid after a stage. Losses are means over held-out data; `divergence` is KL(guide | hybrid) in nats for
    logits, the normalised MSE of the outputs otherwise; FLOPs at the plan's sizes.
    """

    __pydantic_config__ = _STRICT

    part: str
    replaced: int
    of: int
    measure: str
    before: float | None  # the measure's held-out loss at the part's exit
    after: float
    loss: float | None
    metric: float | None
    divergence: float
    steps: int
    seconds: float
    stopped_by: str
    params: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """`stages` and `curves` in order; guide and converted on the same held-out data."""

    __pydantic_config__ = _STRICT

    guide: dict[str, float | None]
    converted: dict[str, float | None]
    stages: tuple[StageRow, ...]
    steps: int
    seconds: float
    params: int
    flops: int
    train_length: int | None
    recipe: dict[str, Any]
    seed: int
    notes: tuple[str, ...] = ()
    copied: dict[str, list[str]] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def html(
        self,
        path: str | os.PathLike[str],
        data: Iterable[Any] | None = None,
        decode: Callable[[list[int]], str] | None = None,
        onnx: str | os.PathLike[str] | None = None,
        trade_offs: TradeOffs | str | os.PathLike[str] | None = None,
        answers: Answers | None = None,
    ) -> Path:
        """Write one self-contained page: plan, curves, costs, settings, and how to serve the file.

        data: batches as `compile` takes them, on which guide and converted are compared as the page is written: how
        alike they are, and where they disagree most. decode(tokens) -> text, such as tokenizer.decode. onnx: the file
        that `converted.export` wrote, whose states the page then names. trade_offs: what `thesean.trade_offs` found, or
        its file: quality stands against latency then, without it against FLOPs. answers: what `thesean.compare_answers`
        found, which stands side by side then. What isn't known (the guide, after
        `thesean.load`) is left out, with a line that says why.

        Raises DataError, also for a report that belongs to no network; ExportError for `onnx`, WriteError.
        """
        writer = getattr(self, "_writer", None)
        if writer is None:
            raise DataError("this report stands alone: a network's own writes a page, converted.report.html().")
        written: Path = writer(path, data, decode, onnx, trade_offs, answers)
        return written

    def written_by(self, writer: Callable[..., Path]) -> ConversionReport:
        """A copy whose pages `writer` writes, since a report alone has no plan and no network."""
        copy = replace(self)
        object.__setattr__(copy, "_writer", writer)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_writer"}  # a copy takes no network along

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ConversionReport:
        """Raises pydantic's ValidationError, a ValueError, for what is no report."""
        found: ConversionReport = _adapter().validate_python(data)
        return found

    @staticmethod
    def from_json(text: str) -> ConversionReport:
        """Raises DataError for anything but what `to_dict` gives."""
        try:
            return ConversionReport.from_dict(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"this is no report of a conversion: {type(error).__name__}: {error}.") from error

    def __str__(self) -> str:
        lines = [f"{'replaced':>9}  {'loss':>8}  {'divergence':>10}  {'before':>8}  {'after':>8}  {'steps':>5}  part"]
        for row in self.stages:
            loss, before = ("" if v is None else f"{v:.4f}" for v in (row.loss, row.before))
            lines.append(
                f"{row.replaced:>4} of {row.of:<2}  {loss:>8}  {row.divergence:>10.4f}  {before:>8}  "
                f"{row.after:>8.4f}  {row.steps:>5}  {row.part}"
            )
        for name, values in (("guide", self.guide), ("converted", self.converted)):
            told = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None)
            lines.append(f"{name}: {told or 'no loss given'}")
        lines.extend(str(curve) for curve in self.curves)
        lines.append(f"{self.steps} steps, {self.seconds:.0f} s")
        lines.extend(f"note: {n}" for n in self.notes)
        return "\n".join(lines)


@cache
def _adapter() -> TypeAdapter[ConversionReport]:
    return TypeAdapter(ConversionReport)
