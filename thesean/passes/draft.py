"""Make a plan for a captured guide: find the parts, measure what they are, choose their targets.

A draft is a plan bound to the graph: the plan is what people read and edit, the draft what the compiler executes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.anatomy import find_attention
from thesean.passes.capture import Captured
from thesean.passes.cost import count_params, flops_by_node
from thesean.passes.flow import Flow, data_flow
from thesean.passes.graph import record
from thesean.passes.partition import Granularity, NamedRegion, halves, no_match, partition
from thesean.passes.plan import KEEP, Plan, PlannedPart
from thesean.passes.probe import probe_mixing
from thesean.passes.regions import Region, module_regions
from thesean.targets import PartFacts, Target, TargetModule, build_module, get_family, resolve
from thesean.targets.base import Dim

TargetSpec = str | Target | Mapping[str, str | Target]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One region to cut out and what is known of it."""

    region: Region
    facts: PartFacts


@dataclass(frozen=True, kw_only=True)
class DraftPart:
    planned: PlannedPart
    region: Region  # the part: its exit is where the hybrid is compared with the guide
    sites: tuple[Site, ...]
    target: Target | None


@dataclass(frozen=True, kw_only=True)
class Draft:
    plan: Plan
    captured: Captured
    parts: tuple[DraftPart, ...]


def make_draft(
    captured: Captured,
    target: TargetSpec,
    *,
    keep: Sequence[str] = (),
    granularity: Granularity = "block",
    parts: Sequence[str] | None = None,
) -> Draft:
    """Raises PlanError (nothing to cut, a glob without a match), UnknownNameError, TargetMismatchError."""
    if not isinstance(target, (str, Target, Mapping)):
        raise PlanError(
            "target: expected a name, a Target or {part glob: name | Target | 'keep'}, "
            f"found {type(target).__name__}."
        )
    keep = (keep,) if isinstance(keep, str) else tuple(keep)  # a lone glob is not a sequence of letters
    parts = (parts,) if isinstance(parts, str) else parts
    flow = data_flow(captured.graph_module.graph)
    chosen, granularity = _choose_regions(flow, target, granularity, parts)
    mapping = {"*": target} if isinstance(target, (str, Target)) else dict(target)
    explicit = not isinstance(target, (str, Target))
    targets: dict[str, Target | None] = {}
    for named in chosen:
        match = next((t for glob, t in mapping.items() if _matches(named.path, glob)), KEEP)
        kept = match == KEEP or any(_matches(named.path, g) for g in keep)
        targets[named.path] = None if kept else resolve(match)
    paths = [c.path for c in chosen]
    for glob in [*keep, *(mapping if explicit else ())]:
        if not any(_matches(p, glob) for p in paths):
            raise PlanError(f"{'keep' if glob in keep else 'target'}: {no_match(glob, paths)}")
    settings = Plan(parts=(), granularity=granularity, part_globs=tuple(parts) if parts is not None else None)
    # a mapping or an explicit list names its parts; a plain target may leave parts alone that it has no use for
    return _bind(captured, flow, chosen, targets, settings, strict=explicit or parts is not None)


def draft_from_plan(captured: Captured, plan: Plan) -> Draft:
    """Bind an (edited) plan. Raises PlanError when its parts are not this guide's."""
    flow = data_flow(captured.graph_module.graph)
    chosen = partition(flow, plan.granularity, plan.part_globs)  # type: ignore[arg-type]
    found, wanted = [c.path for c in chosen], [p.path for p in plan.parts]
    if found != wanted:
        stale = sorted(set(wanted) ^ set(found))
        raise PlanError(
            f"the plan doesn't fit this guide: {', '.join(stale[:4]) or 'the order of parts'} differs. "
            "Make a new one with thesean.plan(...)."
        )
    targets = {p.path: plan.target_of(p.path) for p in plan.parts}
    return _bind(captured, flow, chosen, targets, plan, strict=True)


def probe_sizes(captured: Captured) -> dict[str, int]:
    """Small sizes for probing: a length that no static dimension has, so that dimensions can be told apart."""
    static: set[int] = set()
    for node in captured.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            static.update(int(d) for d in value.shape if not isinstance(d, torch.SymInt))
    length = next(n for n in (11, 13, 7, 17, 19, 23, 29, 31, 37, 41, 43) if n not in static)
    return {name: 2 if name.startswith("batch") else length for name in captured.signature.symbols}


def _choose_regions(
    flow: Flow, target: TargetSpec, granularity: Granularity, parts: Sequence[str] | None
) -> tuple[list[NamedRegion], Granularity]:
    """A mapping whose globs name halves of blocks ("*attn*") asks for the finer granularity."""
    chosen = partition(flow, granularity, parts)
    if isinstance(target, (str, Target)) or parts is not None:
        return chosen, granularity
    tried: tuple[Granularity, ...] = (granularity, "sublayer")
    for finer in tried:
        chosen = partition(flow, finer)
        if all(any(_matches(c.path, glob) for c in chosen) for glob in target):
            return chosen, finer
    known = [*(c.path for c in chosen), *module_regions(flow)]
    missing = next(g for g in target if not any(_matches(c.path, g) for c in chosen))
    raise PlanError(f"target: {no_match(missing, known)}")


def _matches(path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or path == glob


def _bind(
    captured: Captured,
    flow: Flow,
    chosen: list[NamedRegion],
    targets: dict[str, Target | None],
    settings: Plan,
    strict: bool,
) -> Draft:
    graph_module = captured.graph_module
    values = record(graph_module, captured.signature.random_inputs(probe_sizes(captured), device=_device(captured)))
    sizes = _plan_sizes(captured)
    flops = flops_by_node(graph_module, captured.signature, sizes)
    symbols = graph_module.meta["symbols"]
    drafted = []
    for named in chosen:
        target = targets[named.path]
        sites, note = _sites(flow, named, target, values, symbols, graph_module)
        if target is not None and not sites:
            if strict:
                raise TargetMismatchError(f"{named.path}: target {target.name!r} has nothing to replace here: {note}.")
            target = None
        row = PlannedPart(
            path=named.path,
            target=target.name if target else KEEP,
            options=dict(target.options) if target else {},
            scope=target.scope if target else None,
            replaces=tuple(s.facts.path for s in sites) if target else (),
            mixing=_describe_mixing(probe_mixing(named.region, values), values[named.region.entry]),
            input_shape=_shape(named.region.entry, symbols),
            output_shape=_shape(named.region.exit, symbols),
            drops=_dropped(captured, sites) if target else (),
            params=count_params(graph_module, named.region.nodes),
            flops=sum(flops.get(n, 0) for n in named.region.nodes),
        )
        if target is not None:
            row = _with_replacement(row, named, sites, target, flops, sizes, graph_module)
        drafted.append(DraftPart(planned=row, region=named.region, sites=sites if target else (), target=target))
    if not any(d.target for d in drafted):
        raise PlanError("nothing is replaced: every part is kept. Check keep= and the target's scope.")
    rows = tuple(d.planned for d in drafted)
    total_params = sum({id(p): p.numel() for p in graph_module.parameters()}.values())
    total_flops = sum(flops.values())
    plan = replace(
        settings,
        parts=rows,
        sizes=sizes,
        params=total_params,
        flops=total_flops,
        new_params=total_params + sum(r.new_params - r.params for r in rows if not r.kept),
        new_flops=total_flops + sum(r.new_flops - r.flops for r in rows if not r.kept),
        builders={t.name: t for t in targets.values() if t is not None and t.build is not None},
    )
    return Draft(plan=plan, captured=captured, parts=tuple(drafted))


def _sites(
    flow: Flow,
    named: NamedRegion,
    target: Target | None,
    values: dict[fx.Node, Any],
    symbols: dict[str, str],
    graph_module: fx.GraphModule,
) -> tuple[tuple[Site, ...], str]:
    """The regions that `target` cuts out of a part; a family that replaces mixing leaves token-wise branches."""
    if target is None:
        return (), ""
    family = get_family(target.name) if target.build is None else None
    scope = target.scope or (family.scope if family else "part")
    regions = [(named.path, named.region)]
    if scope == "mixing":
        inner = halves(flow, named.region) if named.region.is_fork() else []
        if inner and inner[0].nodes != named.region.nodes:
            regions = [(_inner_path(named.path, r), r) for r in inner]
        regions = [(p, r) for p, r in regions if probe_mixing(r, values) != "none"]
        if not regions:
            return (), "token-wise"
    sites = []
    for path, region in regions:
        facts = PartFacts(
            path=path,
            input_shape=_shape(region.entry, symbols),
            output_shape=_shape(region.exit, symbols),
            mixing=probe_mixing(region, values),
            params=count_params(graph_module, region.nodes),
            attention=find_attention(region, values),
        )
        sites.append(Site(region=region, facts=facts))
    return tuple(sites), ""


def _inner_path(path: str, region: Region) -> str:
    inner = region.path()
    return inner if inner and inner != path else f"{path}.{region.exit.name}"


def build_site(target: Target, site: Site) -> torch.nn.Module:
    """The target's module for a site, freshly initialised, on the guide's device."""
    module = build_module(target, site.facts)
    value = site.region.exit.meta.get("val")
    return module.to(value.device) if isinstance(value, torch.Tensor) else module


def _with_replacement(
    row: PlannedPart,
    named: NamedRegion,
    sites: tuple[Site, ...],
    target: Target,
    flops: dict[fx.Node, int],
    sizes: dict[str, int],
    graph_module: fx.GraphModule,
) -> PlannedPart:
    """Add what the replacement costs: the new modules and whatever of the part stays."""
    cut = {n for s in sites for n in s.region.nodes}
    stays = [n for n in named.region.nodes if n not in cut]
    params, ops = count_params(graph_module, stays), sum(flops.get(n, 0) for n in stays)
    with torch.random.fork_rng(devices=[]):
        for site in sites:
            module = build_site(target, site)
            params += sum(p.numel() for p in module.parameters())
            if isinstance(module, TargetModule):
                ops += module.flops(site.facts, sizes)
    return replace(row, new_params=params, new_flops=ops)


def _shape(node: fx.Node, symbols: dict[str, str]) -> tuple[Dim, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(symbols.get(str(d), str(d)) if isinstance(d, torch.SymInt) else int(d) for d in value.shape)


def _describe_mixing(mixing: str, value: torch.Tensor) -> str:
    if value.ndim == 4:
        return "spatial"
    return {"none": "token-wise"}.get(mixing, mixing) if value.ndim == 3 else "vector"


def _plan_sizes(captured: Captured) -> dict[str, int]:
    """Sizes at which FLOPs are told: the example's own, one row of it."""
    sizes = captured.signature.check(captured.example)
    return {k: 1 if k.startswith("batch") else v for k, v in sizes.items()}


def _dropped(captured: Captured, sites: tuple[Site, ...]) -> tuple[str, ...]:
    """Inputs that the cut regions read past their entry (a padding mask), and nothing else would."""
    dropped: dict[str, None] = {}
    for site in sites:
        inside = set(site.region.nodes) | {site.region.entry}
        front = [i for n in site.region.nodes for i in n.all_input_nodes if i not in inside]
        seen: set[fx.Node] = set()
        while front:
            node = front.pop()
            if node in seen or node is site.region.entry:
                continue
            seen.add(node)
            value = node.meta.get("val")
            if node.op == "placeholder":
                if isinstance(value, torch.Tensor):
                    dropped[str(node.target)] = None
            elif isinstance(value, (torch.Tensor, tuple, list)):  # sizes carry no values
                front.extend(node.all_input_nodes)
    return tuple(dropped)


def _device(captured: Captured) -> str:
    return str(next(iter(captured.example.values())).device)
