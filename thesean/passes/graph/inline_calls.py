"""The graphs that calls are made of, in place of the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from thesean.passes.graph.nodes import leaf_nodes
from thesean.passes.graph.surgery import erase_dead


def inline_calls(graph: fx.Graph, made_of: Callable[[fx.Node], fx.GraphModule | None]) -> int:
    """Each node of which `made_of` knows a graph, as `trace_call` makes it, becomes that graph; how many did."""
    written = 0
    for node in list(graph.nodes):
        if (made := made_of(node)) is not None:
            _inline(graph, node, made)
            written += 1
    if written:
        erase_dead(graph)
    return written


def _inline(graph: fx.Graph, node: fx.Node, made: fx.GraphModule) -> None:
    known: dict[fx.Node, Any] = dict(zip(made.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        for one in made.graph.nodes:
            if one.op == "call_function":
                known[one] = graph.node_copy(one, known.__getitem__)
                known[one].meta = {k: v for k, v in one.meta.items() if k == "val"} | {
                    k: v for k, v in node.meta.items() if k == "nn_module_stack"
                }
    result = made.graph.output_node().args[0]
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(known[result])
    else:  # several: each reader takes one of them
        results = [known[r] for r in leaf_nodes(result)]
        for reader in list(node.users):
            reader.replace_all_uses_with(results[reader.args[1]])  # type: ignore[index]
            graph.erase_node(reader)
    graph.erase_node(node)
