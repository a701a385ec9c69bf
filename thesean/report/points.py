"""What networks lose and what they cost to serve, a point a file, and which of them no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from pydantic import ConfigDict

from thesean.units import MISSING, decimal, milliseconds, quantity

_STRICT = ConfigDict(extra="forbid")

Call = Literal["token", "prefill", "forward"]
Place = tuple[Call, int | None, int]  # what is called, tokens, rows


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call, at one number of rows and tokens: the median over `repeats` turns, the 20th and 80th percentile."""

    __pydantic_config__ = _STRICT

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """A file at `batch` rows of `length` tokens, None where the network has no time dimension: then `prefill` is its
    one forward. None for what could not run there.

    `token`: one more after `length`. `state_bytes` after those, of all rows. `peak_memory_mib` of a process, over what
    it has with onnxruntime loaded and no file: weights, activations and states.
    """

    __pydantic_config__ = _STRICT

    batch: int
    length: int | None
    prefill: Cost | None
    token: Cost | None
    state_bytes: int | None
    peak_memory_mib: float | None


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One file. `kind`: the guide, a hybrid of a frontier, or what a conversion came to. `form`: "float32", or how its
    weights are whole numbers.

    `divergence` from the guide, `loss` and `metric` are means over the same held-out data, `loss` lower is better.
    `token_kind`: one more token by its "state", or by reading all again ("recompute").
    """

    __pydantic_config__ = _STRICT

    name: str
    kind: Literal["guide", "hybrid", "converted"]
    form: str
    replaced: int
    of: int
    divergence: float | None
    loss: float | None
    metric: float | None
    params: int
    file_bytes: int
    token_kind: Literal["state", "recompute"] | None
    served: tuple[Served, ...]

    def at(self, place: Place) -> float | None:
        """The median in milliseconds of a call, None where it was not measured."""
        cost = self.cost(place)
        return None if cost is None else cost.median_ms

    def cost(self, place: Place) -> Cost | None:
        call, length, batch = place
        for s in self.served:
            if (s.length, s.batch) == (length, batch):
                return s.token if call == "token" else s.prefill
        return None


@dataclass(frozen=True, kw_only=True, repr=False)
class Points(Sequence[TradeOff]):
    """In the order in which they were made, the guide first. `unit` of divergences; `judged`: on what the points were.
    Files took turns, on one thread of onnxruntime.
    """

    __pydantic_config__ = _STRICT

    points: tuple[TradeOff, ...]
    unit: str
    judged: str
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> TradeOff: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TradeOff, ...]: ...
    def __getitem__(self, index: int | slice) -> TradeOff | tuple[TradeOff, ...]:
        return self.points[index]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(p.name for p in self.points)}>"

    @property
    def quality(self) -> Literal["loss", "divergence"]:
        """What points are ranked by, lower is better: the loss, without one the divergence."""
        return "loss" if all(p.loss is not None for p in self.points) else "divergence"

    @property
    def places(self) -> tuple[Place, ...]:
        """Where points were measured: tokens, then prefills, or the one forward; by rows and tokens."""
        found: dict[Place, None] = {}
        for s in sorted((s for p in self.points for s in p.served), key=lambda s: (s.batch, s.length or 0)):
            if s.token is not None:
                found["token", s.length, s.batch] = None
            if s.prefill is not None:
                found["forward" if s.length is None else "prefill", s.length, s.batch] = None
        return tuple(sorted(found, key=lambda place: (place[2], place[0] != "token")))

    def optimal(self, place: Place) -> tuple[TradeOff, ...]:
        """The Pareto front at a place, the fastest first: points such that none that is as good is as fast. Two are as
        fast as each other where their turns overlap, from the 20th to the 80th percentile: a noisy machine puts no
        point on the front.
        """
        known = [(q, c.median_ms, p, c) for p in self.points if (c := p.cost(place)) and (q := self.of(p)) is not None]
        best: list[tuple[float, TradeOff, Cost]] = []
        for _, median_ms, point, cost in sorted(known, key=lambda k: k[:2]):  # whatever beats a point comes before it
            if all(cost.p80_ms < other.p20_ms for _, _, other in best):
                best.append((median_ms, point, cost))
        return tuple(point for _, point, _ in sorted(best, key=lambda b: b[0]))

    def of(self, point: TradeOff) -> float | None:
        """A point's quality; None where it is no finite number."""
        found = getattr(point, self.quality)
        return found if found is not None and math.isfinite(found) else None

    def table(self, batch: int | None = None) -> tuple[list[str], list[list[str]]]:
        """Heads and rows at so many rows a batch, by default the first measured: a star where a point is on the front.
        State and peak memory are those of the longest sequence.
        """
        places = [p for p in self.places if p[2] == (self.places[0][2] if batch is None else batch)]
        stars = {(point.name, place) for place in places for point in self.optimal(place)}
        measures = [m for m in ("loss", "metric", "divergence") if any(getattr(p, m) is not None for p in self.points)]
        heads = ["", *measures, "parameters", "file", *map(_short, places), "state", "peak"]
        rows = []
        for p in self.points:
            cells = [milliseconds(p.at(place)) + ("*" if (p.name, place) in stars else "") for place in places]
            judged = (decimal(getattr(p, m)) for m in measures)
            sizes = quantity(p.params), quantity(p.file_bytes, "B")
            rows.append([p.name, *judged, *sizes, *cells, *_memory(p, places[0][2] if places else None)])
        return heads, rows


def _memory(point: TradeOff, batch: int | None) -> tuple[str, str]:
    """State and peak of the longest sequence."""
    last = max((s for s in point.served if s.batch == batch), key=lambda s: s.length or 0, default=None)
    state = last.state_bytes if last is not None and point.token_kind == "state" else None
    peak = last.peak_memory_mib if last is not None else None
    return quantity(state, "B"), MISSING if peak is None else f"{peak:.0f} MiB"


def _short(place: Place) -> str:
    call, length, _ = place
    return call if length is None else f"{call} {length}"
