"""Where a target goes: the regions of a part that are cut out, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from thesean.errors import TargetMismatchError
from thesean.passes.analyse.attention import find_attention
from thesean.passes.analyse.block_facts import FoundBlock, find_block
from thesean.passes.analyse.blocks import halves, pieces
from thesean.passes.analyse.bypass import removal, removals
from thesean.passes.analyse.channels import find_channels
from thesean.passes.analyse.cost import count_params
from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.heads_alone import heads_alone
from thesean.passes.analyse.layout import is_channels_first
from thesean.passes.analyse.mixing import probe_mixing
from thesean.passes.analyse.mlp import find_mlp
from thesean.passes.analyse.padding import Padding, padding_of, values_read
from thesean.passes.analyse.recurrence import find_cell, recurrent_units
from thesean.passes.analyse.regions import Region, is_branch, is_linear_map, module_regions, remembers, same_shape
from thesean.passes.analyse.turned import turned_unread
from thesean.passes.graph.nodes import above, named_dim, owner
from thesean.passes.plan.merge import Group
from thesean.passes.plan.partition import NamedRegion, inner_names
from thesean.targets import PartFacts, Target, build_module, get_family
from thesean.targets.shared.channel_groups import ChannelFacts
from thesean.targets.shared.facts import AttentionFacts, CellFacts, Dim
from thesean.targets.shared.family import Scope

_DROP = Target("identity")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One region to cut out, what is known of it, and what takes its place.

    A site that `removes` hands the target the stream that the region was added to.
    """

    region: Region
    facts: PartFacts
    target: Target
    removes: bool = False
    masks: tuple[Padding, ...] = ()  # of padded steps, which the region reads


class SiteFinder:
    """Finds sites in one graph. `values` are every node's on small random inputs, for probing; `masks` hide nothing
    there.
    """

    def __init__(
        self, graph_module: fx.GraphModule, flow: DataFlow, values: dict[fx.Node, Any], masks: Sequence[Padding] = ()
    ) -> None:
        self.graph_module, self.flow, self.values, self.masks = graph_module, flow, values, masks
        self.symbols: dict[str, str] = graph_module.meta["symbols"]
        self.named = {n.name: n for n in flow.order}
        self._blocks: dict[str, FoundBlock | None] = {}
        self._attentions: dict[tuple[fx.Node, fx.Node], AttentionFacts | None] = {}
        self._cells: dict[tuple[fx.Node, fx.Node], CellFacts | None] = {}
        self._findings: dict[tuple[str, fx.Node, fx.Node], tuple[ChannelFacts | None, str]] = {}

    def sites(self, group: Group, target: Target, keeps: NamedRegion) -> tuple[tuple[Site, ...], str]:
        """The regions that `target` cuts out of a part; none, with the reason, where it has nothing to replace.

        `keeps` is the member that stays where a merged part's others are dropped. Raises TargetMismatchError.
        """
        scope = scope_of(target)
        if scope == "part" or (takes_units(target) and self._cell(group.region) is not None):
            return (self._whole(group, target),), ""
        if takes_channels(target) and self.narrows(group.region) and not self._is_mlp(keeps):
            return (self._whole(group, target),), ""
        dropped = tuple(self._site(group, m.path, m.region, _DROP) for m in group.members if m.path != keeps.path)
        if scope == "members":
            return dropped, "" if dropped else "a part of one member: merge parts to have fewer"
        inner = self._branches(keeps, scope, explicit=len(group.members) == 1)
        if scope == "mixing":
            inner = [(p, heads_alone(r, self.flow, self.values, self._attention) or r) for p, r in inner]
            grown = [(p, r) for p, r in inner if not remembers(r)]
            inner = grown or inner  # beside what grows with the context, a memory of fixed size stays
        if takes_channels(target):
            inner += [(p, r) for p, r in self._branches(keeps, "mixing", explicit=False) if self.narrows(r)]
        if takes_units(target):
            mixing = self._branches(keeps, "mixing", explicit=False)
            inner += [(p, r) for p, r in mixing if (p, r) not in inner and self._cell(r) is not None]
        if not inner:
            return (), self._nothing(keeps, target, scope)
        found = [*dropped, *(self._site(group, path, region, target) for path, region in inner)]
        return tuple(sorted(found, key=lambda s: self.flow.order[s.region.exit])), ""

    def block(self, group: Group) -> FoundBlock | None:
        """The attention and the MLP that a part is; None for any other part, and for merged ones."""
        if len(group.members) > 1:
            return None
        if group.path not in self._blocks:
            self._blocks[group.path] = find_block(self.flow, group.region, self.values)
        return self._blocks[group.path]

    def _is_mlp(self, named: NamedRegion) -> bool:
        """Whether vectors or tokens go through a perceptron, beside a stream or alone: neurons are chosen as such."""
        facts = self.channels(named.region)
        if self.values[named.region.entry].ndim != 2 and not (facts and facts.channels_last):
            return False
        layered = [
            r for _, r in self._branches(named, "token-wise", explicit=True) if sum(map(is_linear_map, r.nodes)) > 1
        ]
        return any(find_mlp(region, self.values) is not None for region in layered)

    def narrows(self, region: Region) -> bool:
        """Whether a stretch over feature maps has channels inside that could be fewer."""
        facts, _ = self._channels(region)
        return facts is not None and bool(facts.inner)

    def channels(self, region: Region) -> ChannelFacts | None:
        """What a stretch over feature maps computes, where it can be read."""
        return self._channels(region)[0]

    def _attention(self, region: Region) -> AttentionFacts | None:
        key = (region.entry, region.exit)
        if key not in self._attentions:
            self._attentions[key] = find_attention(region, self.values)
        return self._attentions[key]

    def _cell(self, region: Region) -> CellFacts | None:
        """The guide's own recurrent cell that a stretch is."""
        key = (region.entry, region.exit)
        if key not in self._cells:
            self._cells[key] = find_cell(region, self.values)
        return self._cells[key]

    def _channels(self, region: Region) -> tuple[ChannelFacts | None, str]:
        key = ("channels", region.entry, region.exit)
        if key not in self._findings:
            self._findings[key] = find_channels(region, self.values)
        return self._findings[key]

    def _whole(self, group: Group, target: Target) -> Site:
        wanted = target.build is None and get_family(target.name).block
        found = self.block(group) if wanted else None
        if found is None:
            return self._site(group, group.path, group.region, target)
        site = self._site(group, group.path, found.region, target)
        return replace(site, facts=replace(site.facts, block=found.facts))

    def _branches(self, named: NamedRegion, scope: Scope, explicit: bool) -> list[tuple[str, Region]]:
        """The branches of a part that mix over time, or those that don't; the part itself where it has none."""
        inner = halves(self.flow, named.region) if named.region.is_fork() else []
        regions = [(named.path, named.region)]
        if inner and inner[0].nodes != named.region.nodes:
            regions = list(zip(inner_names(named.path, inner), inner, strict=True))
        wanted = [(p, r) for p, r in regions if (probe_mixing(r, self.values) == "none") == (scope == "token-wise")]
        if wanted or scope != "mixing" or probe_mixing(named.region, self.values) == "none":
            return wanted
        # mixing without a matrix, in a branch of its own or between the branches
        light = [r for r in pieces(self.flow, named.region) if same_shape(r.entry, r.exit)]
        light = [r for r in light if self.values[r.exit].ndim == 3 and probe_mixing(r, self.values) != "none"]
        return list(zip(inner_names(named.path, light), light, strict=True))

    def _nothing(self, named: NamedRegion, target: Target, scope: Scope) -> str:
        """Why a part has nothing to replace, from what the whole part was seen to do: as its row says."""
        if recurrent_units(named.region) is not None:
            inside = {p: r for p, r in module_regions(self.flow).items() if p.startswith(f"{named.path}.")}
            cells = [path for path, region in inside.items() if self._cell(region) is not None]
            if len(cells) > 1:
                return f"it is made of {', '.join(cells)}, each a cell of its own: parts=['{named.path}.*'] takes them"
        if scope != "mixing":
            facts, unread = self._channels(named.region)
            square = self.values[named.region.entry].ndim == 4
            if facts is None and not square:
                return "nothing token-wise in it"
            if facts is not None and facts.inner:
                return "its channels go out of the whole part: leave scope= out"
            why = unread if facts is None else "it has no channels but its input's and its output's"
            instead = ". For fewer channels inside choose target 'bottleneck' or 'resnet-block' with width="
            return f"of its channels it can't take any: {why}{instead if square else ''}"
        mixing = probe_mixing(named.region, self.values)
        if mixing == "none":
            if shown := self._shown(named):
                return (
                    f"token-wise, for {shown} can't be cut out: what it computes inside is an output of the guide, as "
                    "attention weights are. Have forward return less (output_attentions=False)"
                )
            whole = module_regions(self.flow).get(named.path)
            if whole is None or whole.nodes == named.region.nodes or probe_mixing(whole, self.values) == "none":
                return "token-wise"
            return (
                "its linear maps work step by step, and what mixes over time beside them has no weights. "
                f"parts=[{named.path!r}] takes the whole of it"
            )
        return (
            f"it mixes over time ({mixing}), but in no branch that can be cut out. "
            f"Target({target.name!r}, scope='part') replaces the whole part"
        )

    def _shown(self, named: NamedRegion) -> str | None:
        """A module within a part's that isn't in its region, for the guide returns a value of its inside."""
        returned = self.graph_module.graph.output_node().all_input_nodes
        owners = [owner(n) for n in returned if n not in named.region.nodes]
        return next((path for path in owners if path and path.startswith(f"{named.path}.")), None)

    def _site(self, group: Group, path: str, region: Region, target: Target) -> Site:
        removes = target.build is None and get_family(target.name).removes
        into, out = region.entry, region.exit
        if removes:
            found = removal(region)
            if found is None:
                raise TargetMismatchError(
                    f"{path}: target {target.name!r} expected a part that keeps the shape, found "
                    f"{self.shape(into)} -> {self.shape(out)}. Choose target 'linear', or keep it with "
                    f"keep=[{group.path!r}]."
                )
            out, into = found
        if any(map(self._counted_by_values, (into, out))):
            raise TargetMismatchError(
                f"{path}: target {target.name!r} expected a part that reads a sequence as it stands, found one that is "
                "sent as many tokens as a router decides, other ones in a hybrid than in the guide. Name what is "
                f"around it as a part, or keep it with keep=[{group.path!r}]."
            )
        token_wise = scope_of(target) == "token-wise"
        attention = None if removes else self._attention(region)
        mlp = find_mlp(region, self.values) if token_wise else None
        channels, unread = self._channels(region) if mlp is None and takes_channels(target) else (None, "")
        facts = PartFacts(
            path=path,
            whole=group.path,
            input_shape=self.shape(into),
            output_shape=self.shape(out),
            mixing=probe_mixing(region, self.values),
            params=count_params(self.graph_module, region.nodes),
            attention=attention,
            turned_unread=not removes and turned_unread(region, self.values, attention),
            mlp=mlp,
            cell=None if removes else self._cell(region),
            channels=channels,
            channels_unread=unread,
            is_branch=not removes and is_branch(region),
            channels_first=is_channels_first(region, self.values),
            recurrent_units=recurrent_units(region),
            nonnegative=bool((self.values[region.exit] >= 0).all()),
        )
        masks = () if removes else self._masks(region)
        return Site(region=region, facts=facts, target=target, removes=removes, masks=masks)

    def _masks(self, region: Region) -> tuple[Padding, ...]:
        """Those that a region reads, or else the last one on the way to it: what is hidden from a convolution was
        multiplied by zero before. A mask of other steps than the region's own, as a cross attention reads it, is none.
        """
        steps = self.shape(region.entry)[:2]
        fitting = [m for m in self.masks if self.shape(self.named[m.node]) == steps]
        read = padding_of(region, fitting)
        if read or not fitting:
            return read
        before = above([region.entry])
        return tuple([m for m in fitting if self.named[m.node] in before][-1:])

    def _counted_by_values(self, node: fx.Node) -> bool:
        """Whether a size of it is known only once its values are, as that of what a mask picks."""
        sizes = (d for d in getattr(node.meta.get("val"), "shape", ()) if isinstance(d, torch.SymInt))
        return any(str(symbol) not in self.symbols for d in sizes for symbol in d.node.expr.free_symbols)

    def shape(self, node: fx.Node) -> tuple[Dim, ...]:
        """A node's shape with the signature's names for dynamic dimensions; () for what is not a tensor."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(named_dim(d, self.symbols) for d in value.shape)


def scope_of(target: Target) -> Scope:
    """The target's own, or its family's; a user's builder replaces the whole part."""
    return target.scope or (get_family(target.name).scope if target.build is None else "part")


def takes_units(target: Target) -> bool:
    """Whether it makes fewer units of a guide's own recurrent cells."""
    return target.build is None and target.scope in (None, "part") and get_family(target.name).units


def takes_channels(target: Target) -> bool:
    """Whether it makes fewer channels of feature maps' parts."""
    return target.build is None and target.scope in (None, "part") and get_family(target.name).channels


def build_site(site: Site) -> torch.nn.Module:
    """The target's module for a site, freshly initialised, on the guide's device and in its precision."""
    module = build_module(site.target, site.facts)
    value = site.region.exit.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return module
    dtype = dtype_of(site.region)
    # what a float32 guide is given may mix precisions as it likes
    return module.to(value.device) if dtype == torch.float32 else module.to(value.device, dtype)


def dtype_of(region: Region) -> torch.dtype:
    """What a module in its place computes in: as what it reads, or as what it gives where it reads no floats."""
    dtypes = [n.meta["val"].dtype for n in (region.entry, region.exit)]
    return next((d for d in dtypes if d.is_floating_point), torch.float32)


@torch.no_grad()
def check_built(site: Site, module: torch.nn.Module, values: dict[fx.Node, Any]) -> None:
    """A user's module is run once on the part's recorded input. Raises TargetMismatchError."""
    wanted = tuple(values[site.region.exit].shape)
    x = values[site.region.entry].cpu()
    try:
        y = (module.to(x.dtype) if x.is_floating_point() else module).eval()(x)
    except Exception as error:
        problem = f"one that raises {type(error).__name__}: {error}"
    else:
        y = y[0] if isinstance(y, tuple) else y
        found = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        problem = "" if found == wanted else f"one that gives {found}"
    if problem:
        raise site.facts.mismatch(
            site.target.name,
            found=problem,
            expected=f"a module that takes {tuple(values[site.region.entry].shape)} to {wanted}",
            advice="Build it from part.input_shape and part.output_shape.",
        )


def outline_site(site: Site) -> torch.nn.Module:
    """The module's shapes alone, to count: a family's weights are not drawn."""
    with torch.device("meta" if site.target.build is None else "cpu"):
        return build_module(site.target, site.facts)


def ends_of(sites: Sequence[Site]) -> list[tuple[fx.Node, fx.Node]]:
    """(exit, entry) of each site: the guide's nodes that its replacement's output and input stand for."""
    removed = iter(removals(s.region for s in sites if s.removes))
    return [(next(removed) if s.removes else None) or (s.region.exit, s.region.entry) for s in sites]


def dropped_inputs(sites: Sequence[Site], reading: Sequence[Site] = ()) -> tuple[str, ...]:
    """Inputs that the cut regions read past their entry, and their replacements don't; those at `reading` read the
    masks.
    """
    dropped: dict[str, None] = {}
    for site in sites:
        read = {m.node for m in site.masks} if site in reading else set()
        for node in values_read(site.region, read):
            if node.op == "placeholder" and node.name not in read and isinstance(node.meta.get("val"), torch.Tensor):
                dropped[str(node.target)] = None
    return tuple(dropped)
