"""Bind targets to the parts of a captured guide: what each part is, what would be cut out, what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.analyse.bypass import freed_params
from thesean.passes.analyse.cost import SymbolicSizes, count_params, flops_by_node, remaining_params
from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.describe import attends, describe_operators
from thesean.passes.analyse.layout import is_channels_first
from thesean.passes.analyse.mixing import probe_mixing
from thesean.passes.analyse.padding import find_padding
from thesean.passes.analyse.regions import Region
from thesean.passes.analyse.speed import time_of_module, time_of_nodes
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.probe import recorded_probe
from thesean.passes.graph.along import Along
from thesean.passes.graph.give_back import give_back
from thesean.passes.plan.merge import Group
from thesean.passes.plan.partition import NamedRegion
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import KEEP, PlannedPart
from thesean.passes.plan.sites import Site, SiteFinder, check_built, dropped_inputs, ends_of, outline_site, scope_of
from thesean.targets import Target, TargetModule, decided, get_family
from thesean.targets.shared.family import Place


@dataclass(frozen=True, kw_only=True)
class BoundPart:
    planned: PlannedPart
    region: Region  # the part: its exit is where the hybrid is compared with the guide
    sites: tuple[Site, ...]
    target: Target | None
    # times the guide's part by the model of operators' speed; None where it says nothing
    slowdown: float | None = None
    # what its replacements take over of the guide, and don't know: told in the plan
    told: tuple[str, ...] = ()
    # steps that each site's replacement looks ahead
    ahead: tuple[int, ...] = ()
    # numbers that its replacements carry from step to step, for one row
    state: int = 0


@dataclass(frozen=True, kw_only=True)
class BoundPlan:
    plan: Plan
    captured: Captured
    parts: tuple[BoundPart, ...]


class Binder:
    """Binds targets to parts of one captured guide; what costs time is measured once.

    Raises nothing on its own; `part` and `bound_plan` do.
    """

    def __init__(self, captured: Captured, flow: DataFlow) -> None:
        self.captured, self.flow = captured, flow
        self.graph_module = captured.graph_module
        self.values, masks = recorded_probe(captured, lambda values: find_padding(flow, values))
        # a fact of the guide: whoever reads its activations later leaves out what is hidden
        self.graph_module.meta["padding"] = masks
        self.sizes = _plan_sizes(captured)
        self.flops = flops_by_node(self.graph_module, captured.signature, self.sizes)
        self.site_finder = SiteFinder(self.graph_module, flow, self.values, masks)
        kept = [self.site_finder.named[m.node] for m in masks]
        self.example = Along(self.graph_module, captured.distinct_rows(), kept)

    def part(self, group: Group, target: Target | None, kept: NamedRegion, strict: bool = True) -> BoundPart:
        """One part with its target, None to keep it. Raises TargetMismatchError; unless `strict`, a part in which the
        target has nothing to replace is kept.
        """
        region = group.region
        sites, note = self.site_finder.sites(group, target, kept) if target is not None else ((), "")
        if target is not None and not sites:
            if strict:
                raise TargetMismatchError(f"{group.path}: target {target.name!r} has nothing to replace here: {note}.")
            target = None
        if target is not None:
            given, target = (
                target,
                decided(target, [Place(s.facts, partial(self._look, s)) for s in sites if s.target == target]),
            )
            sites = tuple(replace(s, target=target) if s.target == given else s for s in sites)
            give_back()  # its facts are copies of its weights
        merged = len(group.members) > 1
        skeleton = kept.path if merged and target is not None and any(s.target != target for s in sites) else None
        row = PlannedPart(
            path=group.path,
            target=target.name if target else KEEP,
            options=dict(target.options) if target else {},
            scope=target.scope if target else None,
            members=tuple(m.path for m in group.members) if merged else (),
            keeps=skeleton,
            replaces=tuple(s.facts.path for s in sites),
            operators=describe_operators(region),
            mixing=self._describe_mixing(region, kept=target is None),
            input_shape=self.site_finder.shape(region.entry),
            output_shape=self.site_finder.shape(region.exit),
            params=count_params(self.graph_module, region.nodes),
            flops=sum(self.flops.get(n, 0) for n in region.nodes),
        )
        if target is None:
            return BoundPart(planned=row, region=region, sites=sites, target=None)
        return self._with_replacement(BoundPart(planned=row, region=region, sites=sites, target=target))

    def _look(self, site: Site) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a site is given when the guide runs on the example, and which of its steps hold a token."""
        x = self.example.get(site.region.entry)
        mask_BT: torch.Tensor | None = None
        for mask in site.masks:
            seen_BT = mask.seen(self.example.get(self.site_finder.named[mask.node]))
            mask_BT = seen_BT if mask_BT is None else mask_BT & seen_BT
        return x, mask_BT

    def whole(self, group: Group, target: Target) -> Target:
        """The target for all of a block, where it has another form for that than it is by default; else as it is."""
        if scope_of(target) == "part" or target.scope is not None or not get_family(target.name).block:
            return target
        found = self.site_finder.block(group)
        return target if found is None else Target(target.name, scope="part", **target.options)

    def _describe_mixing(self, region: Region, kept: bool) -> str:
        rank = self.values[region.entry].ndim
        try:
            mixing = probe_mixing(region, self.values)
        except PlanError:
            if not kept:
                raise
            return "examples"  # of one batch, with each other: nothing takes the place of that
        if rank == 4 or is_channels_first(region, self.values):
            return "spatial"
        return {"none": "token-wise"}.get(mixing, mixing) if rank == 3 else "vector"

    def _stays(self, region: Region, sites: Sequence[Site]) -> list[fx.Node]:
        """The nodes of a part that its sites leave alone."""
        cut = {n for s in sites for n in s.region.gone}
        return [n for n in region.nodes if n not in cut]

    def _time(self, nodes: Sequence[fx.Node]) -> float:
        sizes = SymbolicSizes(self.sizes)

        def numel(node: fx.Node) -> int:
            try:
                return math.prod(sizes[d] if isinstance(d, str) else d for d in self.site_finder.shape(node))
            except KeyError:  # as many as the data say, which no plan knows
                return 0

        return time_of_nodes(nodes, self.flops, numel)

    def _with_replacement(self, part: BoundPart) -> BoundPart:
        """Add what the replacement costs: the new modules and whatever of the part stays; how many times the guide's
        part it takes by the model of operators' speed; and what it can't take over.
        """
        row, region, sites = part.planned, part.region, part.sites
        stays = self._stays(region, sites)
        params, ops = count_params(self.graph_module, stays), sum(self.flops.get(n, 0) for n in stays)
        reading, told, ahead, state = [], [], [], 0
        seconds: float | None = self._time(stays)
        with torch.random.fork_rng(devices=[]):
            for site in sites:
                module = outline_site(site)
                ahead.append(int(getattr(module, "lookahead", 0)))
                if site.region.shares:
                    told.append("what is done with its heads' outputs, a gate or a norm, stays the guide's")
                if getattr(module, "reads_mask", False):
                    reading.append(site)
                if site.target.build is not None:
                    check_built(site, module, self.values)
                params += sum(p.numel() for p in module.parameters())
                if isinstance(module, TargetModule):
                    told.append(self._unread(site, module))
                    ops += module.flops(site.facts, SymbolicSizes(self.sizes))
                    told.append(module.unlike(site.facts) or module.kept())
                    state += _state(module, site)
                shape = [SymbolicSizes(self.sizes)[d] if isinstance(d, str) else d for d in site.facts.input_shape]
                took = time_of_module(module, shape)
                seconds = None if took is None or seconds is None else seconds + took
        freed = sum(freed_params(self.graph_module, s.region) for s in sites if s.removes)
        drops = dropped_inputs([s for s in sites if not s.removes], reading)
        before = self._time(region.nodes)
        slowdown = seconds / before if seconds is not None and before > 0 else None
        row = replace(row, drops=drops, new_params=params, new_flops=ops, freed_params=freed)
        return replace(
            part, planned=row, slowdown=slowdown, told=tuple(filter(None, told)), ahead=tuple(ahead), state=state
        )

    def _unread(self, site: Site, module: TargetModule) -> str:
        """Where another family than was named stands for an attention, for want of what it could copy."""
        known = site.facts.attention is not None or not attends(site.region)
        if known or module.family == site.target.name:
            return ""
        return f"its attention was not read off, so that a {module.family}, which copies nothing, stands for it"

    def bind(self, parts: Sequence[BoundPart], settings: Plan) -> BoundPlan:
        """All parts together, in order, with the totals; `settings` carries how the parts were found. Raises PlanError
        for two builders of one name.
        """
        builders = [p.target for p in parts if p.target is not None and p.target.build is not None]
        for target in builders:
            if any(other.name == target.name and other.build is not target.build for other in builders):
                raise PlanError(f"two targets with builders of their own are named {target.name!r}. Rename one.")
        rows = tuple(p.planned for p in parts)
        params = sum({id(p): p.numel() for p in self.graph_module.parameters()}.values())
        flops = sum(self.flops.values())
        # not a sum over parts: they may share parameters, and a table that several read goes with the last of them
        left = remaining_params(self.graph_module, dict(ends_of([s for p in parts for s in p.sites])))
        built = sum(
            p.planned.new_params - count_params(self.graph_module, self._stays(p.region, p.sites))
            for p in parts
            if p.target is not None
        )
        plan = replace(
            settings,
            parts=rows,
            sizes=self.sizes,
            params=params,
            flops=flops,
            new_params=left + built,
            new_flops=flops + sum(r.new_flops - r.flops for r in rows if not r.kept),
            builders={target.name: target for target in builders},
        )
        return BoundPlan(plan=plan, captured=self.captured, parts=tuple(parts))


def _state(module: TargetModule, site: Site) -> int:
    """Numbers that a stateful module carries from step to step, for one row."""
    if not module.stateful:
        return 0
    x = torch.zeros(1, 1, site.facts.width_in, device="meta")
    return sum(t.numel() for t in pytree.tree_leaves(module.initial_state(x)) if t.is_floating_point())


def added_params(row: PlannedPart) -> int:
    """What a part's replacement adds to the whole network; negative where it is smaller."""
    return 0 if row.kept else row.new_params - row.params - row.freed_params


def _plan_sizes(captured: Captured) -> dict[str, int]:
    """Sizes at which FLOPs are told: the example's own, one row of it."""
    sizes = captured.signature.check(captured.example)
    return {k: 1 if k.startswith("batch") else v for k, v in sizes.items()}
