"""The main data flow of a graph: its nodes without the side slice, as a networkx DAG with one source and one sink.

The side slice is what a hidden state does not pass through: parameters and constants, sizes, integer and boolean
tensors, and all values derived only from those (masks, position ids, position and rotary tables). Without this split
every residual block of a transformer shares an edge with the mask, and the first single-entry single-exit region is
the whole network.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

SOURCE = "source"

Vertex = fx.Node | str


@dataclass(frozen=True, kw_only=True)
class Flow:
    """`dag` holds main nodes that reach the output; SOURCE precedes those without a main predecessor."""

    dag: nx.DiGraph
    sink: fx.Node
    side: frozenset[fx.Node]
    order: dict[fx.Node, int]  # position in the graph, a topological order

    def is_main(self, node: fx.Node) -> bool:
        return node in self.dag

    def backbone(self) -> list[Vertex]:
        """The dominators of the output, from SOURCE on: every path from the inputs passes all of them."""
        dominators = nx.immediate_dominators(self.dag, SOURCE)
        chain: list[Vertex] = [self.sink]
        while chain[-1] != SOURCE:
            chain.append(dominators[chain[-1]])
        return chain[::-1]


def side_slice(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value no hidden state flows through; see the head of this file."""
    side: set[fx.Node] = set()
    constant: set[fx.Node] = set()  # no input's values flow in at all, at most their sizes
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr":
            side.add(node)
            constant.add(node)
            continue
        value = node.meta.get("val")
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if node.op == "placeholder":
            if not is_float:
                side.add(node)
            continue
        if node.op == "call_module":  # a replaced part: one that carries a state has no single value of its own
            continue
        inputs = node.all_input_nodes
        size_only = not isinstance(value, (torch.Tensor, tuple, list))
        if size_only or all(i in constant for i in inputs):
            side.add(node)
            constant.add(node)
        elif isinstance(value, torch.Tensor) and not is_float:
            side.add(node)
        elif is_float and all(i in side for i in inputs) and not any(_is_parameter(i) for i in inputs):
            side.add(node)  # an additive mask made from an attention mask; an embedding reads a parameter and is main
    return side


def data_flow(graph: fx.Graph) -> Flow:
    """The DAG of main nodes. Near linear in the nodes."""
    side = side_slice(graph)
    sink = graph.output_node()
    dag: nx.DiGraph = nx.DiGraph()
    main = [n for n in graph.nodes if n not in side]
    for node in main:
        dag.add_node(node)
        for source in node.all_input_nodes:
            if source not in side:
                dag.add_edge(source, node)
    dag = dag.subgraph(nx.ancestors(dag, sink) | {sink}).copy()
    for node in main:
        if node in dag and dag.in_degree(node) == 0:
            dag.add_edge(SOURCE, node)
    return Flow(dag=dag, sink=sink, side=frozenset(side), order={n: i for i, n in enumerate(graph.nodes)})


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(node.meta.get("val"), torch.nn.Parameter)
