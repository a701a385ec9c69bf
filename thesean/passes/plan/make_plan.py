"""Make a plan for a captured guide: divide it into parts, choose their targets, count what that costs.

The plan is what people read and edit; bound to the graph it is what the compiler executes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.analyse.mixing import MixedExamplesError
from thesean.passes.analyse.regions import Region, module_regions, remembers
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.bind import Binder, BoundPart, BoundPlan
from thesean.passes.plan.divide import Division, divide, divide_as, group_matches
from thesean.passes.plan.lookahead import steps_in_a_row
from thesean.passes.plan.merge import Group
from thesean.passes.plan.partition import NamedRegion, no_match
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import KEEP, PlannedPart
from thesean.passes.plan.sites import scope_of
from thesean.passes.plan.spans import spanned
from thesean.targets import Target, resolve
from thesean.units import quantity

# Of the guide's time. Less is within what the model leaves out.
_SLOWER = 1.05
# What a plan says of it, until it is measured
SUPPOSED = "by how fast operators are on one core, whatever the FLOPs say"

TargetSpec = str | Target | Mapping[str, str | Target]


def make_plan(captured: Captured, target: TargetSpec, **division: Any) -> BoundPlan:
    """Divide as `divide` takes it and choose. Raises PlanError (nothing to cut, a glob without a match),
    UnknownNameError, TargetMismatchError.
    """
    check_target(target)
    return plan_division(divide(captured, globs_of(target), **division), target)


def check_target(target: TargetSpec) -> None:
    """Raises PlanError for what is no target, UnknownNameError and TargetMismatchError for one that can't be had."""
    if not isinstance(target, (str, Target, Mapping)):
        raise PlanError(
            "target: expected a name, a Target or {part glob: name | Target | 'keep'}, "
            f"found {type(target).__name__}."
        )
    for chosen in target.values() if isinstance(target, Mapping) else (target,):
        if chosen != KEEP:
            resolve(chosen)


def keeps_all(target: TargetSpec) -> bool:
    """Whether the guide itself is asked for, and no part of it replaced."""
    return isinstance(target, str) and target == KEEP


def globs_of(target: TargetSpec) -> tuple[str, ...]:
    """The globs that targets are given by; none for one target."""
    return tuple(target) if isinstance(target, Mapping) else ()


def plan_division(division: Division, target: TargetSpec) -> BoundPlan:
    """Choose each part's target: the first glob that matches it. Raises as `make_plan`."""
    globs = globs_of(target)
    mapping = dict(target) if isinstance(target, Mapping) else {"*": target}
    targets: dict[str, Target | None] = {}
    for group in division.groups:
        match = next((t for glob, t in mapping.items() if group_matches(group, glob)), KEEP)
        targets[group.path] = None if match == KEEP or group.path in division.kept else resolve(match)
    for glob in globs:
        if not any(group_matches(g, glob) for g in division.groups):
            raise PlanError(f"target: {no_match(glob, [g.path for g in division.groups])}")
    # a mapping or an explicit list names its parts; a plain target may leave parts alone that it has no use for
    strict = isinstance(target, Mapping) or division.settings.part_globs is not None
    try:
        return _bind(division, targets, strict, keeps_all(target))
    except (TargetMismatchError, MixedExamplesError) as error:
        if strict or not all(t is None or scope_of(t) == "mixing" for t in targets.values()):
            raise
        return _elsewhere(division, target, error)


def _elsewhere(division: Division, target: TargetSpec, misfit: TargetMismatchError | MixedExamplesError) -> BoundPlan:
    """Where a target fits none of the parts: the modules beside them that it does fit, as `rnn` an LSTM behind
    convolutions, for what replaces mixing finds a place wherever time is mixed; or else those inside of them, as the
    attention of a layer that carries several streams a token. Raises the misfit where there is none.
    """
    regions = module_regions(division.flow)
    inside = {n for g in division.groups for n in g.region.nodes}

    def fits(path: str) -> bool:
        try:
            plan_division(divide(division.captured, parts=[path]), target)
        except (PlanError, TargetMismatchError):
            return False
        return True

    beside = [p for p, region in regions.items() if p and inside.isdisjoint(region.nodes)]
    fitting = _outermost(beside, fits)
    if fitting:
        notes = _left_to_the_guide({g.path: misfit for g in division.groups})
    else:
        known: dict[tuple[str, ...], bool] = {}  # layers repeat, and are called alike

        def fits_there(path: str) -> bool:
            alike = tuple("*" if name.isdigit() else name for name in path.split("."))
            if alike not in known:
                known[alike] = fits(path)
            return known[alike]

        wholes = [set(g.region.nodes) for g in division.groups]
        below = [p for p, region in regions.items() if p and any(whole > set(region.nodes) for whole in wholes)]
        fitting = _outermost(below, fits_there)
        notes = (f"{_listed([g.path for g in division.groups])}: what fits inside is replaced: {misfit}",)
    if not fitting:
        raise misfit
    bound_plan = plan_division(divide(division.captured, parts=fitting), target)
    return replace(bound_plan, plan=replace(bound_plan.plan, notes=(*notes, *bound_plan.plan.notes)))


def _outermost(paths: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Those that fit and are in none that does."""
    fitting: list[str] = []
    for path in sorted(paths, key=lambda p: p.count(".")):
        if not any(path.startswith(f"{outer}.") for outer in fitting) and fits(path):
            fitting.append(path)
    return fitting


def bind_plan(captured: Captured, plan: Plan) -> BoundPlan:
    """Bind an (edited) plan. Raises PlanError when its parts are not this guide's."""
    division = divide_as(captured, plan)
    targets = {g.path: plan.target_of(p.path) for g, p in zip(division.groups, plan.parts, strict=True)}
    return _keep_measured(_bind(division, targets, strict=True), plan)


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


def _bind(division: Division, targets: Mapping[str, Target | None], strict: bool, keeps_all: bool = False) -> BoundPlan:
    binder = Binder(division.captured, division.flow)
    if not strict:
        division, targets = spanned(division, targets, binder.site_finder)
    kept = division.members()
    parts: list[BoundPart] = []
    misfits: dict[str, TargetMismatchError] = {}
    for group, member in zip(division.groups, kept, strict=True):
        try:
            target = targets[group.path]
            target = binder.whole(group, target) if division.whole and target is not None else target
            parts.append(binder.part(group, target, member, strict))
        except TargetMismatchError as error:
            if strict:
                raise
            misfits[group.path] = error
            parts.append(binder.part(group, None, member))
    remembering = () if strict else _remembering(parts)
    for k in remembering:
        parts[k] = binder.part(division.groups[k], None, kept[k])
    if not any(p.target for p in parts) and not keeps_all:
        if misfits:
            raise next(iter(misfits.values()))
        left = "".join(f"{note}. " for note in division.settings.notes)
        raise PlanError(f"nothing is replaced: {left}{_why(binder, division.groups, kept, targets)}")
    streams = (*_made_causal(parts), *_looking_ahead(parts), *_still_both_ways(parts))
    memories = _left_remembering([parts[k].planned.path for k in remembering])
    memories += () if strict else _remembering_anyway(parts)
    told = (*_left_to_the_guide(misfits), *memories, *streams, *_told(parts), *_state(parts), *_slower(parts))
    notes = tuple(dict.fromkeys((*division.settings.notes, *told)))  # a plan that was handed in has told some already
    return binder.bind(parts, replace(division.settings, notes=notes))


def _remembering(parts: Sequence[BoundPart]) -> list[int]:
    """Parts that mix time by a memory of fixed size, where the target replaces others too: those are what grows with
    the context, and whoever asks for a recurrence has one here. Replaced as well they cost a hybrid most of what it
    knows (benchmarks/results/hybrids.json).
    """
    mixing = [k for k, p in enumerate(parts) if p.target is not None and scope_of(p.target) == "mixing"]
    remembering = [k for k in mixing if all(map(remembers, _regions(parts[k])))]
    return remembering if len(remembering) < len(mixing) else []


def _left_remembering(paths: Sequence[str]) -> tuple[str, ...]:
    """One note for all parts that `_remembering` found."""
    if not paths:
        return ()
    verbs = ("carries", "stays", "it") if len(paths) == 1 else ("carry", "stay", "them")
    told = "{} a memory of fixed size already, and {} the guide's; parts= replaces {} too".format(*verbs)
    return (f"{_listed(paths)} {told}",)


def _remembering_anyway(parts: Sequence[BoundPart]) -> tuple[str, ...]:
    """Where parts with a memory of fixed size are all that a recurrence could be asked for."""
    replaced = [p for p in parts if p.target is not None]
    mixing = [p for p in replaced if p.target is not None and scope_of(p.target) == "mixing"]
    if not replaced or len(mixing) < len(replaced) or not all(remembers(r) for p in mixing for r in _regions(p)):
        return ()
    verb = "carries" if len(replaced) == 1 else "carry"
    told = "a memory of fixed size already: the guide itself decodes with it (thesean.export_guide)"
    return (f"{_listed([p.planned.path for p in replaced])} {verb} {told}",)


def _keeps_memory(part: BoundPart) -> bool:
    """Whether it carries one that none of its replacements takes the place of."""
    return remembers(part.region) and not any(map(remembers, _regions(part)))


def _regions(part: BoundPart) -> list[Region]:
    return [site.region for site in part.sites]


def _made_causal(parts: Sequence[BoundPart]) -> tuple[str, ...]:
    """One note for all parts whose replacements see less than they did: what later steps told is lost."""
    both_ways = [
        p.planned.path for p in parts if p.planned.options.get("causal") and _reads_both_ways(p) and not any(p.ahead)
    ]
    if not both_ways:
        return ()
    verb = "reads" if len(both_ways) == 1 else "read"
    told = "aligned with what is known by then, for streams"
    return (f"{_listed(both_ways)} {verb} both ways; causal=True replacements read no later step, {told}",)


def _looking_ahead(parts: Sequence[BoundPart]) -> tuple[str, ...]:
    """One note for all parts whose replacements look ahead: how far in all, which is how late a stream is."""
    given = [p for p in parts if any(p.ahead)]
    if not given:
        unread = [p.planned.path for p in parts if p.planned.options.get("lookahead")]
        return (f"{_listed(unread)}: lookahead= changes nothing, no later step is read there",) if unread else ()
    sites = [(site.region, steps) for p in given for site, steps in zip(p.sites, p.ahead, strict=True)]
    steps = steps_in_a_row(given[0].region.exit.graph.nodes, {r.exit: (r.entry, steps) for r, steps in sites})
    verb = "reads" if len(given) == 1 else "read"
    told = f"lookahead= comes to {steps} steps in a row, by which the outputs of a stream are late"
    return (f"{_listed([p.planned.path for p in given])} {verb} both ways; {told}",)


def _still_both_ways(parts: Sequence[BoundPart]) -> tuple[str, ...]:
    """Where a stream was asked for: what stands in its way."""
    wanted = any(p.planned.options.get(name) for p in parts for name in ("causal", "lookahead"))
    left = [p.planned.path for p in parts if p.target is None and p.planned.mixing == "bidirectional"]
    if not wanted or not left:
        return ()
    verb = "is" if len(left) == 1 else "are"
    return (f"{_listed(left)} {verb} kept and read{'s' if len(left) == 1 else ''} all steps: the network is no stream",)


def _reads_both_ways(part: BoundPart) -> bool:
    return any(s.facts.mixing == "bidirectional" for s in part.sites)


def _told(parts: Sequence[BoundPart]) -> tuple[str, ...]:
    """One note for all parts whose replacements keep the same, or can't take over the same."""
    by_reason: dict[str, list[str]] = {}
    for part in parts:
        for reason in dict.fromkeys(part.told):
            by_reason.setdefault(reason, []).append(part.planned.path)
    return tuple(f"{_listed(paths)}: {reason}" for reason, paths in by_reason.items())


def _state(parts: Sequence[BoundPart]) -> tuple[str, ...]:
    """What all recurrences together carry along, where each part that mixes over time is one."""
    numbers = sum(p.state for p in parts)
    own = [p for p in parts if _keeps_memory(p)]
    growing = [p for p in parts if not p.state and not _keeps_memory(p)]
    if not numbers or any(p.planned.mixing in ("causal", "bidirectional") for p in growing):
        return ()
    beside = f", beside the memory of {_listed([p.planned.path for p in own])}" if own else ""
    return (f"state: {quantity(4 * numbers, 'B')} a row in float32, at any length{beside}",)


def _slower(parts: Sequence[BoundPart]) -> tuple[str, ...]:
    """One note for all parts that should take longer than the guide's, which FLOPs don't tell."""
    slow = {p.planned.path: p.slowdown for p in parts if p.slowdown is not None and p.slowdown > _SLOWER}
    if not slow:
        return ()
    low, high = (f"{bound(slow.values()):.2g}" for bound in (min, max))
    times = f"{low} times" if low == high else f"{low} to {high} times"
    told = f"{times} the guide's time, {SUPPOSED}"
    advice = "Measure it (context=, or batch= where there is no time), or choose another target"
    return (f"{_listed(list(slow))} should get slower, {told}. {advice}",)


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _left_to_the_guide(misfits: Mapping[str, Exception]) -> tuple[str, ...]:
    """One note for all parts that the target does not fit, with the first one's reason."""
    if not misfits:
        return ()
    named = _listed(list(misfits))
    verb = "is" if len(misfits) == 1 else "are"
    return (f"{named} {verb} left to the guide: {next(iter(misfits.values()))}",)


def _why(
    binder: Binder, groups: Sequence[Group], kept: Sequence[NamedRegion], targets: Mapping[str, Target | None]
) -> str:
    for group, member in zip(groups, kept, strict=True):
        if targets[group.path] is not None:
            try:
                binder.part(group, targets[group.path], member)
            except TargetMismatchError as error:
                return f"{error} So it is with every part; choose another target or scope, or other parts=[...]."
    return (
        "no part has a target. Check keep= and the globs of target=. The guide as it is: thesean.compile(model, "
        "'keep'), or as a file thesean.export_guide(model, path)."
    )
