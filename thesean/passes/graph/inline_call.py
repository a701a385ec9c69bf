"""The graph that a call is made of, in place of the call."""

from __future__ import annotations

from typing import Any

from torch import fx

from thesean.passes.graph.nodes import leaf_nodes


def inline_call(graph: fx.Graph, node: fx.Node, made: fx.GraphModule) -> None:
    """Nodes of `made`, as `trace_call` made it of this node, take its place."""
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
