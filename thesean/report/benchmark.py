"""Latencies of a network, and of the guide beside it, as a table with units and their provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from thesean.report.table import latency_label
from thesean.units import MISSING, milliseconds

Spread = Mapping[str, float]  # median_ms, p20_ms, p80_ms, repeats

_TOLD = {
    "state": "carries a state and reads one token",
    "recompute": "carries no state and reads all tokens again",
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Benchmark(Mapping[str, float | None]):
    """What `Converted.benchmark` measured. As a mapping: the converted network's medians in milliseconds, by situation
    ("prefill_64", "token_64"; "forward" where there is no time dimension), None for what could not run.

    `converted` and `guide` have each situation's median, 20th and 80th percentile over so many repeats. `guide` is None
    where none was timed, and `note` says why. `token_kinds` says how "converted" and "guide" make one more token: with
    a "state", or by "recompute" of all.
    """

    converted: Mapping[str, Spread | None]
    guide: Mapping[str, Spread | None] | None
    contexts: tuple[int, ...]
    batch: int
    token_kinds: Mapping[str, str]
    environment: Mapping[str, Any]
    note: str = ""

    def __getitem__(self, situation: str) -> float | None:
        found = self.converted[situation]
        return None if found is None else found["median_ms"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.converted)

    def __len__(self) -> int:
        return len(self.converted)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {"unit": "ms", "threads": 1, **asdict(self)}

    def __repr__(self) -> str:
        return f"Benchmark({dict(self)})"

    def __str__(self) -> str:
        columns = {"converted": self.converted} | ({"guide": self.guide} if self.guide is not None else {})
        rows = [["", *columns]]
        for situation in self:
            rows.append([latency_label(situation), *(_cell(column.get(situation)) for column in columns.values())])
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = [f"onnxruntime, one thread, batch {self.batch}: median (20th to 80th percentile)"]
        lines += ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"a token: {name} {_TOLD.get(kind, kind)}" for name, kind in self.token_kinds.items()]
        lines += [f"note: {self.note}"] if self.note else []
        return "\n".join([*lines, _where(self.environment)])


def _cell(found: Spread | None) -> str:
    if found is None:
        return MISSING
    return f"{milliseconds(found['median_ms'])} ({milliseconds(found['p20_ms'])} to {milliseconds(found['p80_ms'])})"


def _where(environment: Mapping[str, Any]) -> str:
    told = [str(environment[k]) for k in ("cpu", "instructions") if environment.get(k)]
    keys = ("cores", "torch", "onnxruntime", "commit", "date")
    return ", ".join([*told, *(f"{k} {environment[k]}" for k in keys if environment.get(k))])
