"""Single-entry single-exit regions: what can be cut out and replaced by one module.

A region is (entry, exit]: all main nodes on paths from `entry`, exclusive, to `exit`, inclusive. Data comes in only
through `entry` (side inputs aside) and leaves only through `exit`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from thesean.passes.flow import SOURCE, Flow, Vertex
from thesean.passes.graph import owner

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Region:
    """Main nodes in topological order; the last one is `exit`."""

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]

    def path(self) -> str:
        """The longest module path that all nodes with an owner share."""
        split = [owner(n).split(".") for n in self.nodes if owner(n)]
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*split, strict=False))
        return ".".join(names[0] for names in shared)

    def is_heavy(self) -> bool:
        """Holds a linear map with parameters: a matrix product or a convolution, not a norm or a table."""
        return any(is_linear_map(n) for n in self.nodes)

    def is_fork(self) -> bool:
        """Has parallel paths, such as a residual connection."""
        return len(self.nodes) > 1


def is_linear_map(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is aten.embedding.default:
        return False
    return any(i.op == "get_attr" and getattr(i.meta.get("val"), "ndim", 0) >= 2 for i in node.all_input_nodes)


def is_single_entry_single_exit(flow: Flow, region: Region) -> bool:
    """Edges enter only from `entry` and leave only from `exit`."""
    inside = set(region.nodes)
    for node in region.nodes:
        if any(p not in inside and p is not region.entry for p in flow.dag.predecessors(node)):
            return False
        if node is not region.exit and any(s not in inside for s in flow.dag.successors(node)):
            return False
    return region.exit in inside


def segments(flow: Flow) -> list[Region]:
    """The backbone's minimal regions, in order, from the first node after SOURCE to the output.

    Between two neighbours c, c' of the backbone lie the nodes that c dominates and that c' post-dominates: a path
    that left them without passing c' would reach the output around one of its dominators.
    """
    backbone = flow.backbone()
    inner = _dominated(flow, set(backbone))
    found = []
    for entry, exit_ in itertools.pairwise(backbone):
        if isinstance(entry, str) or isinstance(exit_, str) or exit_ is flow.sink:
            continue
        nodes = sorted([*inner[entry], exit_], key=flow.order.__getitem__)
        found.append(Region(entry=entry, exit=exit_, nodes=tuple(nodes)))
    return found


def _dominated(flow: Flow, backbone: set[Vertex]) -> dict[Vertex, list[fx.Node]]:
    """Backbone vertex -> the other nodes between it and the next."""
    dominators = nx.immediate_dominators(flow.dag, SOURCE)
    nearest: dict[fx.Node, Vertex] = {}
    inner: dict[Vertex, list[fx.Node]] = defaultdict(list)
    for node in sorted((n for n in flow.dag if n != SOURCE), key=flow.order.__getitem__):
        if node in backbone:
            continue
        above = dominators[node]
        nearest[node] = above if above in backbone else nearest[above]
        inner[nearest[node]].append(node)
    return inner


def join(first: Region, last: Region, between: list[Region]) -> Region:
    """Neighbouring segments as one region."""
    nodes = tuple(n for r in [first, *between, *([last] if last is not first else [])] for n in r.nodes)
    return Region(entry=first.entry, exit=last.exit, nodes=nodes)


def branches(flow: Flow, segment: Region) -> list[Region]:
    """The heavy branches of a residual segment, each without its leading norm.

    A residual segment ends in a join of its entry with one or more branches. A branch is cut where its first linear
    map begins, so that a pre-norm stays with the guide: exactly the extent of an attention or MLP module.
    """
    inside = set(segment.nodes)
    joins = segment.exit.all_input_nodes
    if segment.entry not in joins:
        return []
    found = []
    for end in joins:
        if end not in inside:
            continue
        reach = [n for n in segment.nodes if n is end or end in _reachable(flow, n, inside)]
        region = _strip_light_head(flow, Region(entry=segment.entry, exit=end, nodes=tuple(reach)))
        if region.is_heavy() and is_single_entry_single_exit(flow, region):
            found.append(region)
    return found


def _reachable(flow: Flow, node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    front = [node]
    while front:
        for successor in flow.dag.successors(front.pop()):
            if successor in inside and successor not in seen:
                seen.add(successor)
                front.append(successor)
    return seen


def _strip_light_head(flow: Flow, region: Region) -> Region:
    """Move the entry past leading regions without a linear map (norms, activations), as far as it dominates."""
    dag = flow.dag.subgraph({region.entry, *region.nodes})
    if region.exit not in dag or not nx.has_path(dag, region.entry, region.exit):
        return region
    dominators = nx.immediate_dominators(dag, region.entry)
    chain = [region.exit]
    while chain[-1] is not region.entry:
        chain.append(dominators[chain[-1]])
    chain.reverse()
    entry = region.entry
    for candidate in chain[1:-1]:
        above = {n for n in region.nodes if n is candidate or flow.order[n] < flow.order[candidate]}
        between = [n for n in above if n is candidate or nx.has_path(dag, n, candidate)]
        if any(is_linear_map(n) for n in between) or not _keeps_shape(region.entry, candidate):
            break
        entry = candidate
    nodes = tuple(n for n in region.nodes if n is not entry and nx.has_path(dag, entry, n))
    return Region(entry=entry, exit=region.exit, nodes=nodes)


def _keeps_shape(a: fx.Node, b: fx.Node) -> bool:
    """A view that flattens tokens for a matrix product belongs to the product, not to the head."""
    first, second = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(first, torch.Tensor)
        and isinstance(second, torch.Tensor)
        and [str(s) for s in first.shape] == [str(s) for s in second.shape]
    )


def module_regions(flow: Flow) -> dict[str, Region]:
    """Module path -> its region, for every module of the guide whose nodes form one."""
    members: dict[str, list[fx.Node]] = defaultdict(list)
    for node in sorted((n for n in flow.dag if n not in (SOURCE, flow.sink)), key=flow.order.__getitem__):
        names = owner(node).split(".") if owner(node) else []
        for depth in range(1, len(names) + 1):
            members[".".join(names[:depth])].append(node)
    found = {}
    for path, nodes in members.items():
        inside = set(nodes)
        entries = {p for n in nodes for p in flow.dag.predecessors(n) if p not in inside}
        exits = [n for n in nodes if any(s not in inside for s in flow.dag.successors(n))]
        if len(entries) == 1 and len(exits) == 1 and SOURCE not in entries:
            region = Region(entry=entries.pop(), exit=exits[0], nodes=tuple(nodes))
            carries = all(isinstance(n.meta.get("val"), torch.Tensor) for n in (region.entry, region.exit))
            if carries and is_single_entry_single_exit(flow, region):
                found[path] = region
    return found
