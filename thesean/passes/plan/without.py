"""A bound plan in which a part stays the guide's after all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from thesean.passes.analyse.cost import count_params, remaining_params
from thesean.passes.plan.bind import BoundPart, BoundPlan
from thesean.passes.plan.rows import KEEP
from thesean.passes.plan.sites import ends_of

STALE = "warning: the bounds that this plan was chosen for may not be met since a part of it was kept"


def without(bound_plan: BoundPlan, path: str, why: str) -> BoundPlan:
    """The part at `path` is kept, and the plan's notes say `why`. What is known of the others isn't measured anew, and
    neither is the whole, whose latency target "auto" may have chosen it for.
    """
    went = next(p for p in bound_plan.parts if p.planned.path == path)
    row = replace(
        went.planned,
        target=KEEP,
        options={},
        scope=None,
        keeps=None,
        replaces=(),
        drops=(),
        new_params=0,
        new_flops=0,
        freed_params=0,
        new_latency_ms=None,
    )
    kept = BoundPart(planned=row, region=went.region, sites=(), target=None)
    parts = tuple(kept if p is went else p for p in bound_plan.parts)
    plan, graph_module = bound_plan.plan, bound_plan.captured.graph_module

    def left(parts: Iterable[BoundPart]) -> int:
        return remaining_params(graph_module, dict(ends_of([s for p in parts for s in p.sites])))

    cut = {n for s in went.sites for n in s.region.gone}
    stays = count_params(graph_module, [n for n in went.region.nodes if n not in cut])
    plan = replace(
        plan,
        parts=tuple(p.planned for p in parts),
        # by what the whole holds, and not by the part's own: what two parts share is there once
        new_params=plan.new_params + left(parts) - left(bound_plan.parts) - (went.planned.new_params - stays),
        new_flops=plan.new_flops + went.planned.flops - went.planned.new_flops,
        latencies=(),
        notes=(*plan.notes, f"{path}: {why}", *([STALE] if plan.candidates and STALE not in plan.notes else [])),
    )
    return BoundPlan(plan=plan, captured=bound_plan.captured, parts=parts)
