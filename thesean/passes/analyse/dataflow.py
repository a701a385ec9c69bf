"""The main data flow of a graph: its nodes without the side slice, as a networkx DAG with one source and one sink.

The side slice is what a hidden state does not pass through: parameters and constants, sizes, integer and boolean
inputs, and all values derived only from those (masks, position ids, position and rotary tables). Without this split
every residual block of a transformer shares an edge with the mask, and the first single-entry single-exit region is
the whole network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import getitem

import networkx as nx
import torch
from torch import fx

aten = torch.ops.aten

SOURCE = "source"

# in the meta of a floating-point input that is a mask: said once, where its example is at hand (`float_masks`)
MASK = "mask"

Vertex = fx.Node | str

# read nothing of their input but its size, dtype and device
SIZE_ONLY = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
    aten.rand_like.default, aten.randn_like.default,
}  # fmt: skip

# read no more of their second argument than what kind of tensor it is
_AS = {aten.type_as.default, aten.expand_as.default, aten.view_as.default, aten.to.other}


@dataclass(frozen=True, kw_only=True)
class DataFlow:
    """`dag` holds main nodes that reach the output; SOURCE precedes those without a main predecessor."""

    dag: nx.DiGraph
    sink: fx.Node
    side: frozenset[fx.Node]
    order: dict[fx.Node, int]  # position in the graph, a topological order

    @cached_property
    def links(self) -> dict[fx.Node, fx.Node]:
        """a -> b where every path from the inputs to b passes a and every path from a to its output passes b.

        The region between two linked nodes has one entry and one exit; nodes linked in a row are a chain, of which a
        network's residual stream is the longest. A network with several outputs is read along the one that most of it
        leads to, then along what is left for the others.
        """
        found: dict[fx.Node, fx.Node] = {}
        for group, end in self._groups():
            inside = set(group)
            above = immediate_dominators(group, _within(self.dag.predecessors, inside), self.order)
            backwards = {n: -i for n, i in self.order.items()}
            below = immediate_dominators(group[::-1], _within(self.dag.successors, inside), backwards)
            dominates = _ancestry(group, above)
            for node in group:
                following = below[node]
                if node is not end and isinstance(following, fx.Node) and dominates(node, following):
                    found[node] = following
        return found

    @cached_property
    def links_back(self) -> dict[fx.Node, fx.Node]:
        """The inverse of `links`, which is one to one."""
        return {b: a for a, b in self.links.items()}

    def within(self, entry: fx.Node, nodes: Sequence[fx.Node]) -> DataFlow:
        """What flows from `entry` through these nodes to the last of them, as if nothing else read any."""
        dag = self.dag.subgraph([entry, *nodes]).copy()
        dag.add_edge(nodes[-1], self.sink)
        return replace(self, dag=dag)

    def _groups(self) -> list[tuple[list[fx.Node], fx.Node]]:
        """(nodes in order, output): what leads to the output that most nodes lead to, then to the next one..."""
        nodes = [n for n in self.order if n in self.dag and n is not self.sink]
        ends = sorted(self.dag.predecessors(self.sink), key=self.order.__getitem__)
        leads_to: dict[fx.Node, int] = {n: 1 << i for i, n in enumerate(ends)}  # a bit for each output
        for node in reversed(nodes):
            bits = leads_to.get(node, 0)
            for successor in self.dag.successors(node):
                bits |= leads_to.get(successor, 0)
            leads_to[node] = bits
        groups: list[tuple[list[fx.Node], fx.Node]] = []
        while nodes and ends:
            kinds = Counter(leads_to[n] for n in nodes)
            sizes = [sum(c for bits, c in kinds.items() if bits >> i & 1) for i in range(len(ends))]
            best = max(range(len(ends)), key=sizes.__getitem__)
            if not sizes[best]:
                break
            groups.append(([n for n in nodes if leads_to[n] >> best & 1], ends[best]))
            nodes = [n for n in nodes if not leads_to[n] >> best & 1]
        return groups


def _within(
    neighbours: Callable[[fx.Node], Iterable[fx.Node]], inside: set[fx.Node]
) -> Callable[[fx.Node], list[fx.Node]]:
    return lambda node: [n for n in neighbours(node) if n in inside]


def immediate_dominators(
    nodes: Iterable[fx.Node], before: Callable[[fx.Node], list[fx.Node]], order: Mapping[fx.Node, int]
) -> dict[fx.Node, Vertex]:
    """The nearest node that every path to a node passes, SOURCE where there is none (Cooper, Harvey, Kennedy 2001).

    `nodes` come in topological order, so that one sweep is enough; those without a predecessor hang on SOURCE.
    """
    nearest: dict[fx.Node, Vertex] = {}
    for node in nodes:
        common: Vertex | None = None
        for above in before(node):
            common = above if common is None else _meet(common, above, nearest, order)
        nearest[node] = SOURCE if common is None else common
    return nearest


def _meet(a: Vertex, b: Vertex, nearest: Mapping[fx.Node, Vertex], order: Mapping[fx.Node, int]) -> Vertex:
    while a is not b:
        if isinstance(a, str) or isinstance(b, str):
            return SOURCE
        if order[a] > order[b]:
            a = nearest[a]
        else:
            b = nearest[b]
    return a


def _ancestry(nodes: list[fx.Node], above: Mapping[fx.Node, Vertex]) -> Callable[[fx.Node, fx.Node], bool]:
    """A test whether one node dominates another, by the intervals of a walk over the tree of dominators."""
    below: dict[Vertex, list[fx.Node]] = {}
    for node in nodes:
        below.setdefault(above[node], []).append(node)
    first: dict[Vertex, int] = {}
    last: dict[Vertex, int] = {}
    front: list[tuple[Vertex, bool]] = [(SOURCE, False)]
    while front:
        vertex, leaving = front.pop()
        if leaving:
            last[vertex] = len(first)
            continue
        first[vertex] = len(first)
        front.append((vertex, True))
        front.extend((child, False) for child in below.get(vertex, ()))
    return lambda a, b: first[a] <= first[b] < last[a]


def is_size_only(node: fx.Node) -> bool:
    """No values flow into it from what it reads, only sizes."""
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)) or node.target in SIZE_ONLY


def valued_inputs(node: fx.Node) -> list[fx.Node]:
    """What a node reads more of than its size and kind, of an operator that reads any values."""
    return node.all_input_nodes[: 1 if node.target in _AS else None]


def side_slice(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value no hidden state flows through; see the head of this file."""
    side: set[fx.Node] = set()
    constant: set[fx.Node] = set()  # no input's values flow in at all, at most their sizes
    for node in graph.nodes:
        if node.op == "output":
            continue
        value = node.meta.get("val")
        several = value if isinstance(value, (tuple, list)) else (value,)  # an embedding bag returns four tensors
        is_float = any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in several)
        if node.op == "placeholder":
            if not is_float or MASK in node.meta or _starts_recurrences(node) or _is_only_asked(node):
                side.add(node)
            continue
        if node.op == "call_module":  # a replaced part: one that carries a state has no single value of its own
            continue
        inputs = valued_inputs(node)
        if is_size_only(node) or all(i in constant for i in inputs):
            side.add(node)
            constant.add(node)
        elif all(i in side for i in inputs) and not (is_float and any(_is_parameter(i) for i in inputs)):
            # A mask made of integers is on the side; an embedding reads a parameter and is main. Integers made of a
            # hidden state, such as the experts that a router picks, carry it on.
            side.add(node)
    return side


_CELLS = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
_PICKS = {
    aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.contiguous.default, aten.clone.default,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
    aten.split.Tensor, aten.chunk.default, getitem,
}  # fmt: skip


def _starts_recurrences(placeholder: fx.Node) -> bool:
    """The caller's initial state: cells start from it, and nothing else reads it."""
    front, found = [placeholder], False
    for node in front:  # it grows
        for user in node.users:
            if user.target in _CELLS and user.args[0] is not node:
                found = True
            elif user.target in _PICKS:
                front.append(user)
            elif not is_size_only(user):
                return False
    return found


def _is_only_asked(placeholder: fx.Node) -> bool:
    """A floating-point input of which nothing is read but booleans and sizes: a mask of ones and zeros."""
    tensors = [v for u in placeholder.users if isinstance(v := u.meta.get("val"), torch.Tensor)]
    return bool(tensors) and all(v.dtype == torch.bool for v in tensors)


def data_flow(graph: fx.Graph) -> DataFlow:
    """The DAG of main nodes. Near linear in the nodes."""
    side = side_slice(graph)
    sink = graph.output_node()
    reaches = {sink}
    edges: list[tuple[Vertex, fx.Node]] = []
    for node in reversed(graph.nodes):
        if node in side or node not in reaches:
            continue
        sources = [i for i in node.all_input_nodes if i not in side]
        reaches.update(sources)
        edges.extend((source, node) for source in sources or [SOURCE])
    dag: nx.DiGraph = nx.DiGraph()
    dag.add_edges_from(reversed(edges))
    return DataFlow(dag=dag, sink=sink, side=frozenset(side), order={n: i for i, n in enumerate(graph.nodes)})


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(node.meta.get("val"), torch.nn.Parameter)
