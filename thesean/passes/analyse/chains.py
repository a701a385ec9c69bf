"""Rows of minimal regions, each the next one's entry, and the branches beside a residual stream."""

from __future__ import annotations

import torch
from torch import fx

from thesean.passes.analyse.dataflow import SOURCE, DataFlow, Vertex, immediate_dominators
from thesean.passes.analyse.regions import (
    Region,
    is_linear_map,
    is_single_entry_single_exit,
    is_work,
    past_norm,
    same_shape,
)

aten = torch.ops.aten


def chains(flow: DataFlow, within: Region | None = None) -> list[list[Region]]:
    """Rows of minimal regions, each the next one's entry: those of the whole graph, or those inside a region.

    Only the outermost: what lies inside of a region of one chain is not in the list again. A transformer's residual
    stream is one chain; an encoder, and the stretches of a decoder between two readings of it, are one each.
    """
    nodes = within.nodes[:-1] if within is not None else [n for n in flow.order if n in flow.dag and n is not flow.sink]
    inside = set(nodes)
    covered: set[fx.Node] = set()
    found = []
    for node in nodes:
        if node in covered:
            continue
        row: list[Region] = []
        entry, exit_ = node, flow.links.get(node)
        covered.add(node)
        while exit_ in inside:
            region = _between(flow, entry, exit_)
            covered.update(region.nodes)
            if isinstance(exit_.meta.get("val"), torch.Tensor):  # several outputs (a cell's) are no place to cut
                row.append(region)
                entry = exit_
            exit_ = flow.links.get(exit_)
        if row:
            found.append(row)
    return found


def segments_of(flow: DataFlow, region: Region) -> list[Region]:
    """The chain's minimal regions that a region on it is made of, in order."""
    inside = set(region.nodes)
    row: list[Region] = []
    exit_: fx.Node | None = region.exit
    while exit_ in inside and exit_ in flow.links_back:
        entry: fx.Node | None = flow.links_back[exit_]
        while entry in inside and not isinstance(entry.meta.get("val"), torch.Tensor):
            entry = flow.links_back.get(entry)
        if entry is None:  # before a cell the chain parts: there is no place to cut
            break
        row.append(_between(flow, entry, exit_))
        exit_ = entry
    return [r for r in reversed(row) if inside.issuperset(r.nodes)]


def _between(flow: DataFlow, entry: fx.Node, exit_: fx.Node) -> Region:
    """The region of all nodes on paths from one node of a chain to a later one."""
    found = {exit_}
    front = [exit_]
    while front:
        above = [p for p in flow.dag.predecessors(front.pop()) if p not in found and not isinstance(p, str)]
        above = [p for p in above if flow.order[p] > flow.order[entry]]
        found.update(above)
        front.extend(above)
    return Region(entry=entry, exit=exit_, nodes=tuple(sorted(found, key=flow.order.__getitem__)))


def branches(flow: DataFlow, segment: Region, light: bool = False) -> list[Region]:
    """The heavy branches of a residual segment, each without its norms at either end; `light` ones as well.

    A residual segment ends in a join of its entry with one or more branches. A branch is cut where its first linear
    map begins and where its last one ends, so that norms stay with the guide: exactly the extent of an attention or MLP
    module. Branches that are summed before the join or after it (an attention beside an MLP) are told apart where they
    share no more than a norm.
    """
    inside = set(segment.nodes)
    joins = _joined(segment.exit, segment.entry, inside)
    found = []
    for end in joins:
        if end not in inside:
            continue
        apart = [r for e in _summands(end, inside) if (r := _branch(flow, segment, e)) is not None and r.is_heavy()]
        nodes = [n for r in apart for n in r.nodes]
        if len(apart) < 2 or len(nodes) > len(set(nodes)) or not _all_single(flow, apart):
            whole = _branch(flow, segment, end)
            kept = whole is not None and (light or whole.is_heavy()) and _all_single(flow, [whole])
            apart = [whole] if whole is not None and kept else []
        found.extend(apart)
    nodes = [n for r in found for n in r.nodes]
    if len(nodes) > len(set(nodes)):  # one branch reads what another makes
        return []
    return sorted(found, key=lambda r: flow.order[r.exit])


def _joined(end: fx.Node, entry: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """The entry and what is added to it up to `end`, one after the other; nothing where the entry is not in the sum."""
    terms = end.all_input_nodes
    if entry in terms:
        return terms
    if end.target is not aten.add.Tensor:
        return []
    for term in terms:
        earlier = _joined(term, entry, inside) if term in inside and term.target is aten.add.Tensor else []
        if earlier:
            return [*earlier, *(t for t in terms if t is not term)]
    return []


def _all_single(flow: DataFlow, regions: list[Region]) -> bool:
    return all(is_single_entry_single_exit(flow, r) for r in regions)


def _summands(end: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """What a sum of sums inside a segment adds up; the node itself where it is no sum of two inner nodes."""
    if end.target is not aten.add.Tensor or len(end.all_input_nodes) != 2 or not inside.issuperset(end.all_input_nodes):
        return [end]
    return [e for i in end.all_input_nodes for e in _summands(i, inside)]


def _branch(flow: DataFlow, segment: Region, end: fx.Node) -> Region | None:
    """All that leads from the segment's entry to `end`, without leading norms."""
    inside = set(segment.nodes)
    reach = {end}
    front = [end]
    while front:
        above = [p for p in flow.dag.predecessors(front.pop()) if p in inside and p not in reach]
        reach.update(above)
        front.extend(above)
    nodes = tuple(n for n in segment.nodes if n in reach)
    branch = _strip_light_head(flow, Region(entry=segment.entry, exit=end, nodes=nodes))
    return branch and _strip_norm_tail(branch)


def _strip_norm_tail(region: Region) -> Region:
    """Move the exit back before a norm that nothing heavy follows, to where the last linear map ends."""
    heavy = [at for at, node in enumerate(region.nodes) if is_linear_map(node)]
    for at in range(heavy[-1] if heavy else len(region.nodes), len(region.nodes) - 1):
        if same_shape(region.nodes[at], region.exit) and past_norm(region.nodes[at]) is region.exit:
            return Region(entry=region.entry, exit=region.nodes[at], nodes=region.nodes[: at + 1])
    return region


def _strip_light_head(flow: DataFlow, region: Region) -> Region | None:
    """Move the entry past leading regions without a linear map (norms, activations), as far as it dominates."""
    known = {region.entry, *region.nodes}
    nearest = immediate_dominators(
        [region.entry, *region.nodes], lambda n: [p for p in flow.dag.predecessors(n) if p in known], flow.order
    )
    nearest[region.entry] = SOURCE  # whatever leads to it from inside its own segment
    chain: list[Vertex] = [region.exit]
    while chain[-1] is not region.entry:
        if isinstance(chain[-1], str):
            return None  # reached around the entry
        chain.append(nearest[chain[-1]])
    chain.reverse()
    place = {vertex: i for i, vertex in enumerate(chain)}
    for node in region.nodes:  # a node's place is that of the chain's last node before it
        place.setdefault(node, place[nearest[node]])
    first_heavy = min((place[n] - (n in chain) for n in region.nodes if is_work(n)), default=0)
    start = 0
    for at in range(1, min(first_heavy, len(chain) - 2) + 1):
        # a view that flattens tokens for a matrix product belongs to the product, not to the head
        candidate = chain[at]
        if isinstance(candidate, str) or not same_shape(region.entry, candidate):
            break
        start = at
    entry = chain[start]
    assert isinstance(entry, fx.Node)
    nodes = tuple(n for n in region.nodes if place[n] >= start and n is not entry)
    return Region(entry=entry, exit=region.exit, nodes=nodes)
