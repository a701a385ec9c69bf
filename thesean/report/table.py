"""The table that ends a conversion: guide, converted and baselines side by side, and one honest sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from thesean.units import decimal, duration, milliseconds, quantity

BASELINES = ("scratch", "distillation")
ORDER = ("guide", "converted", *BASELINES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's figures. None means not measured.

    `loss` and `metric` are on held-out data, `flops` are per forward at the report's example size, `latency_ms` maps a
    situation ("prefill_64", "token_2048") to the median of onnxruntime, `steps` and `seconds` are what its training
    cost beyond the guide's.
    """

    name: str
    loss: float | None = None
    metric: float | None = None
    params: int | None = None
    flops: int | None = None
    onnx_bytes: int | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN and infinity, which JSON doesn't have, become None."""
        values = asdict(self)
        values["latency_ms"] = dict(self.latency_ms)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


def render(rows: Sequence[Row], *, title: str = "Guide and converted", metric_name: str = "metric") -> Group:
    """A rich table, one column a model and one line a measure, then `verdict`. What nobody measured is left out."""
    rows = sort_rows(rows)
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(row.name, justify="right", style="bold green" if row.name == "converted" else None)
    for label, cells in lines(rows, metric_name):
        table.add_row(label, *cells)
    return Group(table, Text(verdict(rows)))


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """Guide, converted, baselines, then whatever else there is, in the order given."""
    return sorted(rows, key=lambda row: ORDER.index(row.name) if row.name in ORDER else len(ORDER))


def lines(rows: Sequence[Row], metric_name: str = "metric") -> list[tuple[str, list[str]]]:
    """The table's lines, a label and a cell a row, in human units."""
    lines = [
        ("loss", [decimal(row.loss) for row in rows]),
        (metric_name, [decimal(row.metric) for row in rows]),
        ("parameters", [quantity(row.params) for row in rows]),
        ("FLOPs", [quantity(row.flops, "FLOP") for row in rows]),
        ("ONNX size", [quantity(row.onnx_bytes, "B") for row in rows]),
    ]
    for key in dict.fromkeys(key for row in rows for key in row.latency_ms):
        lines.append((latency_label(key), [milliseconds(row.latency_ms.get(key)) for row in rows]))
    lines.append(("training steps", [f"{row.steps:,}" if row.steps is not None else "-" for row in rows]))
    lines.append(("training time", [duration(row.seconds) for row in rows]))
    return [(label, cells) for label, cells in lines if any(cell != "-" for cell in cells)]


def latency_label(key: str) -> str:
    """ "token_2048" -> "token at 2048"; keys of another form stay as they are."""
    kind, _, size = key.rpartition("_")
    if not (kind and size.isdigit()):
        return key
    told = {
        "prefill": f"prefill of {size} tokens",
        "token": f"token at {size}",
        "cached_token": f"token at {size}, KV cache",
    }
    return told.get(kind, f"{kind} {size}")


def verdict(rows: Sequence[Row]) -> str:
    """Whether converted's loss is below both baselines', by how much, or by how much it isn't."""
    by_name = {row.name: row for row in rows}
    converted = by_name.get("converted")
    baselines = [by_name[name] for name in BASELINES if name in by_name]
    if converted is None or not baselines:
        return "Nothing to compare: the report needs the converted model and at least one baseline."
    if not _measured(converted):
        return "Converted has no finite loss, so it beats nothing."
    comparable = [row for row in baselines if _measured(row)]
    broken = [row.name for row in baselines if not _measured(row)]
    if not comparable:
        return f"No baseline has a finite loss ({', '.join(broken)}), so there is nothing to compare with."
    worse = [row for row in comparable if not _loss(converted) < _loss(row)]
    gaps = ", ".join(_gap(converted, row) for row in comparable)
    if worse:
        names = " and ".join(row.name for row in worse)
        sentence = f"Converted does NOT beat {names}: its loss {decimal(converted.loss)} is {gaps}"
    else:
        both = "both baselines" if len(comparable) == 2 else comparable[0].name
        sentence = f"Converted beats {both}: its loss {decimal(converted.loss)} is {gaps}"
    sentence += _budget([converted, *comparable])
    if broken:
        sentence += f" No finite loss from {', '.join(broken)}."
    if "guide" in by_name and _measured(by_name["guide"]):
        sentence += f" That is {_gap(converted, by_name['guide'])}."
    return sentence


def _budget(rows: Sequence[Row]) -> str:
    """Ends the sentence with the steps, equal or not: a comparison at unequal budgets must say so."""
    if any(row.steps is None for row in rows):
        return "."
    if len({row.steps for row in rows}) == 1:
        return f", all at {rows[0].steps:,} optimizer steps."
    spent = ", ".join(f"{row.name} {row.steps:,}" for row in rows)
    return f"; the optimizer steps are NOT equal ({spent})."


def _gap(converted: Row, other: Row) -> str:
    gap = _loss(other) - _loss(converted)
    if gap == 0:
        return f"equal to {_whose(other)}"
    places = 4 if abs(gap) >= 5e-5 else 8  # a hair's breadth is not 0.0000
    return f"{abs(gap):.{places}f} {'below' if gap > 0 else 'above'} {_whose(other)}"


def _whose(row: Row) -> str:
    return "the guide's" if row.name == "guide" else f"{row.name}'s"


def _measured(row: Row) -> bool:
    return row.loss is not None and math.isfinite(row.loss)


def _loss(row: Row) -> float:
    return math.nan if row.loss is None else row.loss
