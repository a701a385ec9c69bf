"""The hybrid: a copy of the guide's graph in which some parts are target modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.padding import Padding
from thesean.passes.analyse.regions import join_of
from thesean.passes.base import Attempt, run_passes
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.graph.dump import dump, not_dumping
from thesean.passes.graph.surgery import clean, clone
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.sites import build_site, ends_of
from thesean.passes.remove import Remove, bypass, check_gone
from thesean.passes.substitute import Substitute, check_called_once, splice
from thesean.recipe import Positions
from thesean.targets import PartFacts, TargetModule


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One module in a hybrid. Node names are the hybrid's, `guide_*` the guide's; they outlive later passes."""

    part: int
    name: str  # the module's attribute in the hybrid
    facts: PartFacts
    family: str
    entry: str
    exit: str
    guide_entry: str
    guide_exit: str
    # where the exit is added to a residual stream: the node of the sum and the stream before it, in both graphs
    join: tuple[str, str] | None
    guide_join: str | None
    copied: tuple[str, ...] = ()
    masks: tuple[Padding, ...] = ()  # that the module is given; their nodes are those of both graphs


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """`graph_module` has parameters of its own; `boundaries[k]` names part k's exit in the hybrid and in the guide.

    Where only some of the plan's parts are replaced, the others keep their numbers, up to the last one that is.
    """

    graph_module: fx.GraphModule
    replacements: tuple[Replacement, ...]
    boundaries: tuple[tuple[str, str], ...]
    parts: tuple[str, ...]  # their paths, in order

    def module(self, replacement: Replacement) -> nn.Module:
        return self.graph_module.get_submodule(replacement.name)

    def has_weights(self, replacement: Replacement) -> bool:
        """Else it was only dropped, and has nothing to train."""
        return any(True for _ in self.module(replacement).parameters())

    def of_part(self, part: int) -> tuple[Replacement, ...]:
        return tuple(r for r in self.replacements if r.part == part)

    def parameters_of(self, parts: Sequence[int]) -> list[nn.Parameter]:
        wanted = [self.module(r) for r in self.replacements if r.part in set(parts)]
        return [p for m in wanted for p in m.parameters()]


def build_hybrid(
    bound_plan: BoundPlan, only: int | Collection[int] | None = None, copy_weights: bool = True, share: bool = False
) -> Hybrid:
    """Replace the replaceable parts (`only` the first so many, or those of these numbers); fresh modules, the guide's
    weights where they fit.

    The guide's graph and parameters are untouched; with `share`, what is kept is the guide's own until `unshare`. Draw
    order of the initial weights: part by part, so the same torch seed gives the same modules.
    """
    parts = [p for p in bound_plan.parts if p.target is not None]
    chosen = set(range(len(parts) if only is None else only) if only is None or isinstance(only, int) else only)
    parts = parts[: max(chosen, default=-1) + 1]
    sites = [s for k, p in enumerate(parts) if k in chosen for s in p.sites]
    guide = bound_plan.captured.graph_module
    graph_module = clone(guide, share)
    flow = data_flow(graph_module.graph)  # once: it says of every part whether it can be cut out
    nodes = {n.name: n for n in graph_module.graph.nodes}
    by_name = dict(nodes)
    replacements: list[Replacement] = []
    joins: list[tuple[fx.Node, fx.Node] | None] = []
    prefix = _free_prefix(guide)
    guide_ends = iter(ends_of(sites))
    outs: list[list[tuple[fx.Node, str]]] = []  # of each part: outputs in the hybrid, what they were in the guide
    for k, part in enumerate(parts):
        outs.append([])
        for i, site in enumerate(part.sites if k in chosen else ()):
            name = f"{prefix}_{k}" if len(part.sites) == 1 else f"{prefix}_{k}_{i}"
            module = build_site(site)
            copied: tuple[str, ...] = ()
            if copy_weights and isinstance(module, TargetModule):
                copied = module.copy_from(site.facts)
            guide_exit, guide_entry = next(guide_ends)
            region, path = site.region.translate(nodes), site.facts.path
            entry = by_name[guide_entry.name]
            if site.removes:
                ends = (by_name[guide_exit.name], entry)
                out = bypass(graph_module, region, name, module, path=path, flow=flow, ends=ends)
            else:
                out = splice(graph_module, region, name, module, path=path, flow=flow, entry=entry, masks=site.masks)
            dump(Remove.name if site.removes else Substitute.name, graph_module, "modified", path, live=True)
            by_name[guide_exit.name] = out  # later regions and boundaries mean the replacement's output
            outs[-1].append((out, guide_exit.name))
            joins.append(None if site.removes else join_of(site.region))
            replacements.append(
                Replacement(
                    part=k,
                    name=name,
                    facts=site.facts,
                    family=getattr(module, "family", site.target.name),
                    entry=entry.name,
                    exit=out.name,
                    guide_entry=guide_entry.name,
                    guide_exit=guide_exit.name,
                    join=None,
                    guide_join=None,
                    copied=copied,
                    masks=site.masks if getattr(module, "reads_mask", False) else (),
                )
            )
    clean(graph_module)
    graph_module.recompile()
    graph_module.graph.lint()
    check_called_once(graph_module, [r.name for r, s in zip(replacements, sites, strict=True) if not s.removes])
    check_gone(graph_module, [s.region.translate(nodes) for s in sites])
    # only now: the sum of one replacement may read the output of another
    alive = set(graph_module.graph.nodes)
    named = {n.name for n in alive}
    # of two parallel branches that were both dropped, the first one's stand-in went with the second
    replacements = [
        _with_join(r, j, by_name, alive) for r, j in zip(replacements, joins, strict=True) if r.exit in named
    ]
    exits = [p.region.exit.name for p in parts]
    boundaries = tuple(_boundary(e, outs[k:], by_name, alive) if k in chosen else (e, e) for k, e in enumerate(exits))
    graph_module.meta["symbols"] = guide.meta["symbols"]
    return Hybrid(
        graph_module=graph_module,
        replacements=tuple(replacements),
        boundaries=boundaries,
        parts=tuple(p.planned.path for p in parts),
    )


def trial_hybrid(
    bound_plan: BoundPlan, only: int | Collection[int] | None = None, copy_weights: bool = True, share: bool = False
) -> Hybrid:
    """One that is no step of the run's own: no number is drawn for it, and no graph told."""
    with torch.random.fork_rng(devices=[]), not_dumping():
        return build_hybrid(bound_plan, only, copy_weights, share)


def view_of(bound_plan: BoundPlan, hybrid: Hybrid, parts: Collection[int]) -> Hybrid:
    """The guide with these parts of the hybrid in it, the hybrid's own modules: what trains one trains the other. The
    rest is the guide's own, and not to be changed.
    """
    view = trial_hybrid(bound_plan, parts, copy_weights=False, share=True)
    known = {r.name: r for r in hybrid.replacements}
    for r in view.replacements:
        if r.name in known:
            setattr(view.graph_module, r.name, hybrid.module(r))
    copied = (replace(r, copied=known[r.name].copied) if r.name in known else r for r in view.replacements)
    return replace(view, replacements=tuple(copied))


def bound_positions(graph_module: fx.GraphModule, positions: Positions = "clamp") -> str:
    """Every converted network ends with this: positions past the guide's table never read out of range, in place.

    What to tell of it; "" where nothing was to do. A network that BoundPositions refuses stays as it is.
    """
    _, (note,) = run_passes(graph_module, Attempt(BoundPositions(positions)))
    return {"modified": f"positions past the guide's table: {positions}", "refused": note.reason}.get(note.outcome, "")


def _boundary(
    exit_: str, outs: list[list[tuple[fx.Node, str]]], by_name: dict[str, fx.Node], alive: set[fx.Node]
) -> tuple[str, str]:
    """Where a part ends, in the hybrid and in the guide: a branch that was dropped ends where its sum did. `outs` are
    those of the part and of the later ones.
    """
    if by_name[exit_] in alive:
        return by_name[exit_].name, exit_
    later = [pair for row in outs for pair in reversed(row) if pair[0] in alive]
    return later[0][0].name, later[0][1]


def _free_prefix(guide: fx.GraphModule) -> str:
    """part, or part2, part3... for a guide that was itself converted."""
    taken = {name.split("_")[0] for name, _ in guide.named_children()}
    return next(p for p in ("part", *(f"part{n}" for n in range(2, len(taken) + 3))) if p not in taken)


def _with_join(
    replacement: Replacement, join: tuple[fx.Node, fx.Node] | None, by_name: dict[str, fx.Node], alive: set[fx.Node]
) -> Replacement:
    """`alive`: a parallel branch that was the stream of this one's sum may have been taken out."""
    if join is None or any(by_name[n.name] not in alive for n in join):
        return replacement
    total, stream = join
    return replace(replacement, join=(by_name[total.name].name, by_name[stream.name].name), guide_join=total.name)
