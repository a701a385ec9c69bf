"""A network from where values of it are in hand: nothing before them runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

from thesean.passes.graph.nodes import above
from thesean.passes.graph.walk import Inputs, output_from


class Tail:
    """`known` are names of nodes whose values are in hand; `run` are the nodes that the output needs beside them. The
    network is in eval mode by then.
    """

    def __init__(self, graph_module: fx.GraphModule, known: Collection[str]) -> None:
        nodes = graph_module.graph.nodes
        self.graph_module, self._known = graph_module, {n for n in nodes if n.name in known}
        needed = above(graph_module.graph.output_node().all_input_nodes, self._known)
        self.run = [n for n in nodes if n in needed]

    def output(self, values: Mapping[str, Any], inputs: Inputs) -> Any:
        """Of the known nodes' values by name, and the network's inputs."""
        return output_from(self.graph_module, self.run, {n: values[n.name] for n in self._known}, inputs)
