"""What a plan holds: its parts, latencies and probed candidates, as data alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict

from thesean.passes.plan.partition import Granularity
from thesean.targets.shared.family import Scope

# Of a plan's YAML: a field that doesn't exist is a typing error, not a comment
_STRICT = ConfigDict(extra="forbid")

KEEP = "keep"


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """One row of a plan. FLOPs are those of one forward at the plan's `sizes`; latencies those of the part alone at
    the first of the plan's `latencies`, None where nothing was measured. `new_` figures have what stays of the part.
    """

    __pydantic_config__ = _STRICT

    path: str
    target: str  # a family's name, a custom target's name, or "keep"
    options: dict[str, Any] = field(default_factory=dict)
    scope: Scope | None = None
    members: tuple[str, ...] = ()  # the guide's parts that were merged to this one
    keeps: str | None = None  # the member that stays where the others are dropped
    replaces: tuple[str, ...] = ()  # module paths of the regions that are cut out
    operators: str = ""  # what it computes, such as "attention + mlp"
    mixing: str = "none"
    input_shape: tuple[int | str, ...] = ()
    output_shape: tuple[int | str, ...] = ()
    drops: tuple[str, ...] = ()  # side inputs that the replacement does not read, such as a padding mask
    params: int = 0
    flops: int = 0
    new_params: int = 0
    new_flops: int = 0
    freed_params: int = 0  # of what goes with a dropped part, such as the norm before a branch
    latency_ms: float | None = None
    new_latency_ms: float | None = None

    @property
    def kept(self) -> bool:
        return self.target == KEEP


LatencyKind = Literal["prefill", "token", "forward"]


@dataclass(frozen=True, kw_only=True)
class PlanLatency:
    """Medians of onnxruntime on one thread, before anything is trained; None for what can't run there.

    `ceiling_ms` is the guide without the parts that the plan replaces: no replacement of them can be faster. "token"
    is one more token after `context` of them, with the state or cache that a file carries; a guide without one reads
    all of them again, and `cache_floor_ms` is then its time for one token without a past, which no key-value cache can
    beat. "forward" is for
    networks without a time dimension, whose context is None.
    """

    __pydantic_config__ = _STRICT

    context: int | None
    batch: int
    kind: LatencyKind
    guide_ms: float | None
    plan_ms: float | None
    ceiling_ms: float | None
    cache_floor_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class ProbedCandidate:
    """What target "auto" found out of one candidate of one part.

    `divergence` of the guide with this part alone replaced: nats for logits, else the normalised MSE. `added_ms` to
    the whole network's latency, by the additive model; None where latency was no constraint.
    """

    __pydantic_config__ = _STRICT

    path: str
    target: str
    divergence: float
    added_ms: float | None
    params: int
    flops: int
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class PlanRows:
    """Parts in order, the settings that they were found with, and what the whole network costs before and after."""

    __pydantic_config__ = _STRICT

    parts: tuple[PlannedPart, ...]
    granularity: Granularity = "block"
    part_globs: tuple[str, ...] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    params: int = 0
    flops: int = 0
    new_params: int = 0
    new_flops: int = 0
    latencies: tuple[PlanLatency, ...] = ()
    notes: tuple[str, ...] = ()
    candidates: tuple[ProbedCandidate, ...] = ()  # of target "auto"

    def __iter__(self) -> Iterator[PlannedPart]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def replaced(self) -> tuple[PlannedPart, ...]:
        return tuple(p for p in self.parts if not p.kept)
