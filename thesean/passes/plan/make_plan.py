"""Make a plan for a captured guide: find the parts, measure what they are, choose their targets.

The plan is what people read and edit; bound to the graph it is what the compiler executes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.regions import module_regions
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.bind import Binder, BoundPlan
from thesean.passes.plan.merge import Group, merge_by_count, merge_to_count, most_changing, regroup, singles
from thesean.passes.plan.partition import (
    GRANULARITIES,
    Granularity,
    NamedRegion,
    matches,
    no_match,
    partition,
    read_by_several,
)
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import KEEP, PlannedPart
from thesean.targets import Target, resolve

TargetSpec = str | Target | Mapping[str, str | Target]

# Example inputs that neighbours are compared on: enough tokens to tell them apart, few enough to plan in a second
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 16, 128


def make_plan(
    captured: Captured,
    target: TargetSpec,
    *,
    keep: Sequence[str] = (),
    granularity: Granularity = "block",
    parts: Sequence[str] | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
) -> BoundPlan:
    """Raises PlanError (nothing to cut, a glob without a match), UnknownNameError, TargetMismatchError."""
    if not isinstance(target, (str, Target, Mapping)):
        raise PlanError(
            "target: expected a name, a Target or {part glob: name | Target | 'keep'}, "
            f"found {type(target).__name__}."
        )
    if merge is not None and target_parts is not None:
        raise PlanError("merge= and target_parts= say the same thing in two ways; give one of them.")
    keep = (keep,) if isinstance(keep, str) else tuple(keep)  # a lone glob is not a sequence of letters
    parts = (parts,) if isinstance(parts, str) else parts
    flow = data_flow(captured.graph_module.graph)
    merging = merge is not None or target_parts is not None
    if parts is not None or merging or not isinstance(target, Mapping):
        chosen = partition(flow, granularity, parts)
    else:
        chosen, granularity = _fine_enough(flow, target, granularity)
    groups = find_groups(captured, flow, chosen, merge, target_parts)
    mapping = {"*": target} if isinstance(target, (str, Target)) else dict(target)
    explicit = not isinstance(target, (str, Target))
    targets: dict[str, Target | None] = {}
    for group in groups:
        match = next((t for glob, t in mapping.items() if group_matches(group, glob)), KEEP)
        kept = match == KEEP or any(group_matches(group, g) for g in keep)
        targets[group.path] = None if kept else resolve(match)
    for glob in [*keep, *(mapping if explicit else ())]:
        if not any(group_matches(g, glob) for g in groups):
            paths = [g.path for g in groups]
            raise PlanError(f"{'keep' if glob in keep else 'target'}: {no_match(glob, paths)}")
    settings = settings_of(flow, groups, granularity, parts)
    # a mapping or an explicit list names its parts; a plain target may leave parts alone that it has no use for
    return _bind(captured, flow, groups, targets, {}, settings, strict=explicit or parts is not None)


def settings_of(flow: DataFlow, groups: Sequence[Group], granularity: Granularity, parts: Sequence[str] | None) -> Plan:
    """A plan without parts: how they were found, and what a person will miss among them."""
    globs = tuple(parts) if parts is not None else None
    notes = _left_out(flow, groups) if parts is None else ()
    return Plan(parts=(), granularity=granularity, part_globs=globs, notes=notes)


def _left_out(flow: DataFlow, groups: Sequence[Group]) -> tuple[str, ...]:
    """One note for all residual branches that are no part, and inside of none, because they read several streams."""
    inside = {n for g in groups for n in g.region.nodes}
    paths = [path for path, end in read_by_several(flow) if path and end not in inside]
    if not paths:
        return ()
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    verb = "is" if len(paths) == 1 else "are"
    return (f"{named} {verb} left to the guide: a target has one input, found a branch that reads several",)


def bind_plan(captured: Captured, plan: Plan) -> BoundPlan:
    """Bind an (edited) plan. Raises PlanError when its parts are not this guide's."""
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
    targets = {g.path: plan.target_of(p.path) for g, p in zip(groups, plan.parts, strict=True)}
    keeps = {g.path: p.keeps for g, p in zip(groups, plan.parts, strict=True) if p.keeps is not None}
    return _keep_measured(_bind(captured, flow, groups, targets, keeps, plan, strict=True), plan)


def _keep_measured(bound_plan: BoundPlan, plan: Plan) -> BoundPlan:
    """With the latencies and notes of the plan that was handed in, unless it was edited since they were made."""
    same_sizes = bound_plan.plan.sizes == plan.sizes

    def written(part: PlannedPart) -> tuple[object, ...]:
        known = (part.target, part.options, part.scope, part.keeps, part.replaces, part.new_params)
        return (*known, part.new_flops if same_sizes else None)

    pairs = list(zip(bound_plan.plan.parts, plan.parts, strict=True))
    if any(written(new) != written(old) for new, old in pairs):
        return replace(bound_plan, plan=replace(bound_plan.plan, latencies=(), notes=()))
    rows = tuple(replace(a, latency_ms=b.latency_ms, new_latency_ms=b.new_latency_ms) for a, b in pairs)
    parts = tuple(replace(p, planned=row) for p, row in zip(bound_plan.parts, rows, strict=True))
    return replace(bound_plan, plan=replace(bound_plan.plan, parts=rows), parts=parts)


def _fine_enough(
    flow: DataFlow, target: Mapping[str, str | Target], granularity: Granularity
) -> tuple[list[NamedRegion], Granularity]:
    """A mapping whose globs name halves of blocks ("*attn*") asks for a finer granularity."""
    for finer in GRANULARITIES[GRANULARITIES.index(granularity) :]:
        chosen = partition(flow, finer)
        if all(any(matches(c.path, glob) for c in chosen) for glob in target):
            return chosen, finer
    known = [*(c.path for c in partition(flow, granularity)), *(c.path for c in chosen), *module_regions(flow)]
    missing = next(g for g in target if not any(matches(c.path, g) for c in chosen))
    raise PlanError(f"target: {no_match(missing, list(dict.fromkeys(known)))}")


def find_groups(
    captured: Captured, flow: DataFlow, chosen: list[NamedRegion], merge: int | None, target_parts: int | None
) -> list[Group]:
    """The parts of a plan: the regions, or several merged to one. Raises PlanError."""
    if target_parts is not None:
        return merge_to_count(flow, chosen, target_parts, _on_example(captured, [c.region.exit for c in chosen]))
    return merge_by_count(flow, chosen, merge) if merge is not None else singles(chosen)


def group_matches(group: Group, glob: str) -> bool:
    """A merged part is matched by its own name, or when all of its members are."""
    return matches(group.path, glob) or all(matches(m.path, glob) for m in group.members)


@torch.no_grad()
def _on_example(captured: Captured, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """These nodes' values on some of the example inputs."""
    inputs = dict(captured.example)
    for spec in captured.signature.inputs:
        for at, size in enumerate(spec.shape):
            if isinstance(size, str):
                most = _EXAMPLE_BATCH if size.startswith("batch") else _EXAMPLE_LENGTH
                inputs[spec.name] = inputs[spec.name].narrow(at, 0, min(most, inputs[spec.name].shape[at]))
    values = intermediates(captured.graph_module, [n.name for n in nodes], with_output=False)(**inputs)
    return {n: values[n.name] for n in nodes}


def _bind(
    captured: Captured,
    flow: DataFlow,
    groups: list[Group],
    targets: dict[str, Target | None],
    keeps: dict[str, str],
    settings: Plan,
    strict: bool,
) -> BoundPlan:
    binder = Binder(captured, flow)
    kept = kept_members(captured, groups, keeps)
    parts = [binder.part(g, targets[g.path], k, strict) for g, k in zip(groups, kept, strict=True)]
    if not any(p.target for p in parts):
        raise PlanError(f"nothing is replaced: {_why(binder, groups, kept, targets)}")
    return binder.bind(parts, settings)


def _why(
    binder: Binder, groups: Sequence[Group], kept: Sequence[NamedRegion], targets: Mapping[str, Target | None]
) -> str:
    for group, member in zip(groups, kept, strict=True):
        if targets[group.path] is not None:
            try:
                binder.part(group, targets[group.path], member)
            except TargetMismatchError as error:
                return f"{error} So it is with every part; choose another target or scope, or other parts=[...]."
    return "no part has a target. Check keep= and the globs of target=."


def kept_members(captured: Captured, groups: Sequence[Group], keeps: Mapping[str, str]) -> list[NamedRegion]:
    """For each part the member that stays where a target drops the others: the plan's choice, or the busiest one."""
    undecided = [g for g in groups if len(g.members) > 1 and g.path not in keeps]
    values: dict[fx.Node, Any] = {}
    if undecided:
        ends = [n for g in undecided for m in g.members for n in (m.region.entry, m.region.exit)]
        values = _on_example(captured, list(dict.fromkeys(ends)))
    return [
        next(m for m in g.members if m.path == keeps[g.path])
        if g.path in keeps
        else (most_changing(g, values) if len(g.members) > 1 else g.members[0])
        for g in groups
    ]
