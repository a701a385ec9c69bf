"""Single-entry single-exit regions: what can be cut out and replaced by one module.

A region is (entry, exit]: all main nodes on paths from `entry`, exclusive, to `exit`, inclusive. Data comes in only
through `entry` (side inputs aside) and leaves only through `exit`.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.flow import SOURCE, Flow, Vertex, immediate_dominators
from thesean.passes.graph import calls_of, constants_of, owner

aten = torch.ops.aten


# move or rename values without computing
VIEWS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.contiguous.default, aten.clone.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.t.default, aten.flatten.using_ints,
    aten._unsafe_view.default, aten.alias.default, aten.select.int, aten.cat.default,
}  # fmt: skip


def shared_path(nodes: Iterable[fx.Node]) -> str:
    """The longest path that all of these nodes with an owner share, of a module that is called where there is one."""
    owned = [n for n in nodes if owner(n)]
    split = [owner(n).split(".") for n in owned]
    shared = [names[0] for names in itertools.takewhile(lambda n: len(set(n)) == 1, zip(*split, strict=False))]
    called = set(calls_of(owned[0])) if owned else set()
    depth = next((d for d in range(len(shared), 0, -1) if ".".join(shared[:d]) in called), len(shared))
    return ".".join(shared[:depth])  # a list of modules is never called: its holder is the block


@dataclass(frozen=True, kw_only=True)
class Region:
    """Main nodes in topological order; the last one is `exit`."""

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]

    def path(self) -> str:
        """The longest module path that all nodes with an owner share; views, which compute nothing, don't count."""
        return shared_path(n for n in self.nodes if n.target not in VIEWS) or shared_path(self.nodes)

    def is_heavy(self) -> bool:
        """Holds a linear map with parameters: a matrix product or a convolution, not a norm or a table."""
        return any(is_linear_map(n) for n in self.nodes)

    def translate(self, by_name: dict[str, fx.Node]) -> Region:
        """The same region in a copy of the graph; `by_name` maps this graph's names to the copy's nodes."""
        return Region(
            entry=by_name[self.entry.name],
            exit=by_name[self.exit.name],
            nodes=tuple(by_name[n.name] for n in self.nodes),
        )

    def is_fork(self) -> bool:
        """Has parallel paths, such as a residual connection."""
        return sum(isinstance(n.meta.get("val"), torch.Tensor) for n in self.nodes) > 1

    def is_residual(self) -> bool:
        """entry + f(entry), with linear maps in f."""
        return self.exit.target is aten.add.Tensor and self.entry in self.exit.all_input_nodes and self.is_heavy()


_PRODUCTS = {
    "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "mv", "addmv", "einsum", "bilinear", "_trilinear",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "_convolution", "lstm", "gru", "rnn_tanh", "rnn_relu",
}  # fmt: skip


def is_linear_map(node: fx.Node) -> bool:
    """A product with a parameter of two dimensions or more, however that is viewed, cast or picked from a bank."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._opname not in _PRODUCTS:
        return False
    return any(_is_matrix(i) for i in node.all_input_nodes)


def _is_matrix(node: fx.Node) -> bool:
    while node.target in VIEWS or node.target in _PICKS:
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return any(getattr(n.meta.get("val"), "ndim", 0) >= 2 for n in constants_of(node))


_PICKS = {aten.index.Tensor, aten.index_select.default, aten.to.dtype, aten._to_copy.default, aten.numpy_T.default}


def is_single_entry_single_exit(flow: Flow, region: Region) -> bool:
    """Edges enter only from `entry` and leave only from `exit`."""
    inside = set(region.nodes)
    for node in region.nodes:
        if any(p not in inside and p is not region.entry for p in flow.dag.predecessors(node)):
            return False
        if node is not region.exit and any(s not in inside for s in flow.dag.successors(node)):
            return False
    return region.exit in inside


def join_of(region: Region) -> tuple[fx.Node, fx.Node] | None:
    """(sum, stream) where the exit's only use is `stream + exit`: the region is a branch beside a residual stream."""
    return sum_of(region.exit)


def sum_of(branch: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(sum, other) where a node's only use is the sum of it and another one, which enters as it is."""
    users = list(branch.users)
    if len(users) != 1 or users[0].target not in (aten.add.Tensor, aten.add_.Tensor):
        return None
    others = [a for a in users[0].args[:2] if a is not branch]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    if users[0].kwargs.get("alpha", 1) != 1 and users[0].args[1] is others[0]:
        return None
    stream, have = others[0].meta.get("val"), branch.meta.get("val")
    same = isinstance(stream, torch.Tensor) and isinstance(have, torch.Tensor) and stream.ndim == have.ndim
    return (users[0], others[0]) if same else None


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Both are tensors of the same symbolic shape."""
    first, second = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(first, torch.Tensor)
        and isinstance(second, torch.Tensor)
        and [str(s) for s in first.shape] == [str(s) for s in second.shape]
    )


def span(flow: Flow, first: Region, last: Region) -> Region | None:
    """One region from the entry of `first` to the exit of `last`, with all between; None unless it is single-entry."""
    inside = {last.exit}
    front = [last.exit]
    while front:
        for above in flow.dag.predecessors(front.pop()):
            if above is first.entry or above in inside:
                continue
            if isinstance(above, str) or flow.order[above] < flow.order[first.entry]:
                return None
            inside.add(above)
            front.append(above)
    nodes = tuple(sorted(inside, key=flow.order.__getitem__))
    region = Region(entry=first.entry, exit=last.exit, nodes=nodes)
    return region if is_single_entry_single_exit(flow, region) else None


def chains(flow: Flow, within: Region | None = None) -> list[list[Region]]:
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


def segments(flow: Flow) -> list[Region]:
    """The longest chain of the graph: its main stream."""
    return max(chains(flow), key=len, default=[])


def segments_of(flow: Flow, region: Region) -> list[Region]:
    """The chain's minimal regions that a region on it is made of, in order."""
    inside = set(region.nodes)
    row: list[Region] = []
    exit_: fx.Node | None = region.exit
    while exit_ in inside and exit_ in flow.links_back:
        entry = flow.links_back[exit_]
        while entry in inside and not isinstance(entry.meta.get("val"), torch.Tensor):
            entry = flow.links_back[entry]
        row.append(_between(flow, entry, exit_))
        exit_ = entry
    return [r for r in reversed(row) if inside.issuperset(r.nodes)]


def _between(flow: Flow, entry: fx.Node, exit_: fx.Node) -> Region:
    """The region of all nodes on paths from one node of a chain to a later one."""
    found = {exit_}
    front = [exit_]
    while front:
        above = [p for p in flow.dag.predecessors(front.pop()) if p not in found and not isinstance(p, str)]
        above = [p for p in above if flow.order[p] > flow.order[entry]]
        found.update(above)
        front.extend(above)
    return Region(entry=entry, exit=exit_, nodes=tuple(sorted(found, key=flow.order.__getitem__)))


def join(first: Region, last: Region, between: list[Region]) -> Region:
    """Neighbouring segments as one region."""
    nodes = tuple(n for r in [first, *between, *([last] if last is not first else [])] for n in r.nodes)
    return Region(entry=first.entry, exit=last.exit, nodes=nodes)


def branches(flow: Flow, segment: Region) -> list[Region]:
    """The heavy branches of a residual segment, each without its leading norm.

    A residual segment ends in a join of its entry with one or more branches. A branch is cut where its first linear
    map begins, so that a pre-norm stays with the guide: exactly the extent of an attention or MLP module. Branches
    that are summed before the join (an attention beside an MLP) are told apart where they share no more than a norm.
    """
    inside = set(segment.nodes)
    joins = segment.exit.all_input_nodes
    if segment.entry not in joins:
        return []
    found = []
    for end in joins:
        if end not in inside:
            continue
        apart = [r for e in _summands(end, inside) if (r := _branch(flow, segment, e)) is not None and r.is_heavy()]
        nodes = [n for r in apart for n in r.nodes]
        if len(apart) < 2 or len(nodes) > len(set(nodes)) or not _all_single(flow, apart):
            whole = _branch(flow, segment, end)
            apart = [whole] if whole is not None and whole.is_heavy() and _all_single(flow, [whole]) else []
        found.extend(apart)
    return sorted(found, key=lambda r: flow.order[r.exit])


def _all_single(flow: Flow, regions: list[Region]) -> bool:
    return all(is_single_entry_single_exit(flow, r) for r in regions)


def _summands(end: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """What a sum of sums inside a segment adds up; the node itself where it is no sum of two inner nodes."""
    if end.target is not aten.add.Tensor or len(end.all_input_nodes) != 2 or not inside.issuperset(end.all_input_nodes):
        return [end]
    return [e for i in end.all_input_nodes for e in _summands(i, inside)]


def _branch(flow: Flow, segment: Region, end: fx.Node) -> Region | None:
    """All that leads from the segment's entry to `end`, without leading norms."""
    inside = set(segment.nodes)
    reach = {end}
    front = [end]
    while front:
        above = [p for p in flow.dag.predecessors(front.pop()) if p in inside and p not in reach]
        reach.update(above)
        front.extend(above)
    nodes = tuple(n for n in segment.nodes if n in reach)
    return _strip_light_head(flow, Region(entry=segment.entry, exit=end, nodes=nodes))


def _strip_light_head(flow: Flow, region: Region) -> Region | None:
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
    first_heavy = min((place[n] - (n in chain) for n in region.nodes if is_linear_map(n)), default=0)
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


def module_regions(flow: Flow) -> dict[str, Region]:
    """Module path -> its region, for every module of the guide whose nodes form one; path#2 for its second call."""
    members: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    for node in flow.order:
        if node not in flow.dag or node is flow.sink:
            continue
        names = owner(node).split(".") if owner(node) else []
        calls = calls_of(node)
        for depth in range(1, len(names) + 1):
            path = ".".join(names[:depth])
            members[path, calls.get(path, "")].append(node)
    found = {}
    taken: Counter[str] = Counter()
    for (path, _), nodes in members.items():
        inside = set(nodes)
        entries = {p for n in nodes for p in flow.dag.predecessors(n) if p not in inside}
        exits = [n for n in nodes if any(s not in inside for s in flow.dag.successors(n))]
        taken[path] += 1
        if len(entries) == 1 and len(exits) == 1 and SOURCE not in entries:
            region = Region(entry=entries.pop(), exit=exits[0], nodes=tuple(nodes))
            carries = all(isinstance(n.meta.get("val"), torch.Tensor) for n in (region.entry, region.exit))
            if carries and is_single_entry_single_exit(flow, region):
                found[path if taken[path] == 1 else f"{path}#{taken[path]}"] = region
    return found
