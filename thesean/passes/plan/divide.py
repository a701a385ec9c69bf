"""Divide a captured guide into the parts of a plan, before anything is asked of targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thesean.errors import PlanError
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.regions import module_regions
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.leave_out import LeavingOut
from thesean.passes.plan.merge import Group, merge_by_count, merge_to_count, most_missed, regroup, singles
from thesean.passes.plan.partition import (
    GRANULARITIES,
    Granularity,
    NamedRegion,
    matches,
    no_match,
    partition,
    read_by_several,
    read_twice,
)
from thesean.passes.plan.plan import Plan

# Example inputs that parts are left out on: enough to tell them apart, few enough to run as often as there are parts
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 16, 64


@dataclass(frozen=True, kw_only=True)
class Division:
    """The parts of one guide, in order. `kept` are the paths that keep= leaves to the guide, `keeps` the member of a
    merged part that stays where the others are dropped, as far as it is decided; `settings` is a plan without parts.
    `whole`: blocks were asked for, so that a target which replaces less of one by default takes all of it if it can.
    """

    captured: Captured
    flow: DataFlow
    groups: tuple[Group, ...]
    settings: Plan
    kept: frozenset[str] = frozenset()
    keeps: Mapping[str, str]
    whole: bool = False

    def members(self) -> list[NamedRegion]:
        """For each part the member that stays where a target drops the others: as decided, or the most missed one."""
        leaving_out = _leaving_out(self.captured)
        return [
            next(m for m in g.members if m.path == self.keeps[g.path])
            if g.path in self.keeps
            else (most_missed(g, leaving_out) if len(g.members) > 1 else g.members[0])
            for g in self.groups
        ]


def divide(
    captured: Captured,
    globs: Sequence[str] = (),
    *,
    keep: str | Sequence[str] = (),
    granularity: Granularity | None = None,
    parts: str | Sequence[str] | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
) -> Division:
    """By granularity, or as fine as `globs`, which targets will be given by, ask for. Raises PlanError (nothing to cut,
    a glob without a match, two ways of merging). Without a granularity, by blocks.
    """
    if merge is not None and target_parts is not None:
        raise PlanError("merge= and target_parts= say the same thing in two ways; give one of them.")
    keep = (keep,) if isinstance(keep, str) else tuple(keep)  # a lone glob is not a sequence of letters
    parts = (parts,) if isinstance(parts, str) else parts
    flow = data_flow(captured.graph_module.graph)
    merging = merge is not None or target_parts is not None
    whole, granularity = granularity == "block", granularity or "block"
    if parts is not None or merging or not globs:
        chosen = partition(flow, granularity, parts)
    else:
        chosen, granularity, parts = _fine_enough(flow, globs, granularity)
    groups, keeps = _groups(captured, flow, chosen, merge, target_parts)
    for glob in keep:
        if not any(group_matches(g, glob) for g in groups):
            raise PlanError(f"keep: {no_match(glob, [g.path for g in groups])}")
    return Division(
        captured=captured,
        flow=flow,
        groups=tuple(groups),
        settings=_settings(flow, groups, granularity, parts),
        kept=frozenset(g.path for g in groups if any(group_matches(g, glob) for glob in keep)),
        keeps=keeps,
        whole=whole and granularity == "block" and parts is None,
    )


def divide_as(captured: Captured, plan: Plan) -> Division:
    """As an (edited) plan is divided. Raises PlanError when its parts are not this guide's."""
    flow = data_flow(captured.graph_module.graph)
    chosen = partition(flow, plan.granularity, plan.part_globs)
    found = [c.path for c in chosen]
    wanted = [m for p in plan.parts for m in p.members or (p.path,)]
    if found != wanted:
        stale = sorted(set(wanted) ^ set(found))
        raise PlanError(
            f"the plan doesn't fit this guide: {', '.join(stale[:4]) or 'the order of parts'} differs. "
            "Make a new one with thesean.plan(...)."
        )
    groups = regroup(flow, chosen, [p.members or (p.path,) for p in plan.parts])
    for group, part in zip(groups, plan.parts, strict=True):
        if part.keeps is not None and part.keeps not in [m.path for m in group.members]:
            raise PlanError(f"part {part.path!r}: keeps {part.keeps!r}, which is none of its members.")
    keeps = {g.path: p.keeps for g, p in zip(groups, plan.parts, strict=True) if p.keeps is not None}
    return Division(captured=captured, flow=flow, groups=tuple(groups), settings=plan, keeps=keeps)


def group_matches(group: Group, glob: str) -> bool:
    """A merged part is matched by its own name, or when all of its members are."""
    return matches(group.path, glob) or all(matches(m.path, glob) for m in group.members)


def _fine_enough(
    flow: DataFlow, globs: Sequence[str], granularity: Granularity
) -> tuple[list[NamedRegion], Granularity, Sequence[str] | None]:
    """Globs that name halves of blocks ("*attn*") ask for a finer granularity, those that name modules outside of all
    blocks ("lm_head") for these modules as parts: the last value.
    """
    for finer in GRANULARITIES[GRANULARITIES.index(granularity) :]:
        chosen = partition(flow, finer)
        if all(any(matches(c.path, glob) for c in chosen) for glob in globs):
            return chosen, finer, None
    named = module_regions(flow)
    if all(glob in named for glob in globs):  # a glob might mean whatever is around
        return partition(flow, granularity, globs), granularity, globs
    known = [*(c.path for c in partition(flow, granularity)), *(c.path for c in chosen), *named]
    missing = next(g for g in globs if not any(matches(c.path, g) for c in chosen))
    if missing in named:
        advice = f"parts={[missing]} cuts it out, or name modules alone, without globs."
        raise PlanError(f"target: {missing!r} is a module and no part beside the others that are asked for. {advice}")
    raise PlanError(f"target: {no_match(missing, list(dict.fromkeys(known)))}")


def _groups(
    captured: Captured, flow: DataFlow, chosen: list[NamedRegion], merge: int | None, target_parts: int | None
) -> tuple[list[Group], dict[str, str]]:
    """The parts of a plan, the regions or several merged to one, and which member of one stays. Raises PlanError."""
    if target_parts is not None:
        return merge_to_count(flow, chosen, target_parts, _leaving_out(captured))
    return (merge_by_count(flow, chosen, merge) if merge is not None else singles(chosen)), {}


def _settings(flow: DataFlow, groups: Sequence[Group], granularity: Granularity, parts: Sequence[str] | None) -> Plan:
    """A plan without parts: how they were found, and what a person will miss among them."""
    globs = tuple(parts) if parts is not None else None
    notes = _left_out(flow, groups) if parts is None else ()
    return Plan(parts=(), granularity=granularity, part_globs=globs, notes=notes)


def _left_out(flow: DataFlow, groups: Sequence[Group]) -> tuple[str, ...]:
    """What is no part and inside of none: one note for all residual branches that read several streams, one for all
    cells whose states are read.
    """
    inside = {n for g in groups for n in g.region.nodes}
    several_in = [path for path, end in read_by_several(flow) if path and end not in inside]
    several_out = [path for path, node in read_twice(flow) if path and node not in inside]
    return (
        *_left(several_in, "a target has one input, found a branch that reads several"),
        *_left(
            several_out,
            "a target has one output, found a last state that is read beside it. Return the output alone: a converted "
            "network carries its own state, and its file takes and returns it",
        ),
    )


def _left(paths: Sequence[str], why: str) -> tuple[str, ...]:
    if not paths:
        return ()
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return (f"{named} {'is' if len(paths) == 1 else 'are'} left to the guide: {why}",)


def _leaving_out(captured: Captured) -> LeavingOut:
    """On some of the example inputs; nothing is computed before it is asked."""
    inputs = dict(captured.example)
    for spec in captured.signature.inputs:
        for at, size in enumerate(spec.shape):
            if isinstance(size, str):
                most = _EXAMPLE_BATCH if size.startswith("batch") else _EXAMPLE_LENGTH
                inputs[spec.name] = inputs[spec.name].narrow(at, 0, min(most, inputs[spec.name].shape[at]))
    return LeavingOut(captured.graph_module, inputs)
