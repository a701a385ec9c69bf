"""Graphs that are written by hand: nothing is told but operators and their arguments, and the values of one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from thesean.passes.graph.nodes import mark_constants
from thesean.passes.graph.record import record

Call = Callable[..., Any]


def written(made: Callable[..., Any], *inputs: torch.Tensor, **held: torch.Tensor) -> fx.GraphModule:
    """What `made(call, *inputs, **held)` makes of inputs and of parameters and buffers, which go by their names.

    Each node's value stands in its `meta["val"]`, as a capture's metadata would.
    """
    root, graph = nn.Module(), fx.Graph()
    for name, value in held.items():
        setattr(root, name, value if isinstance(value, nn.Parameter) else nn.Buffer(value))
    places = [graph.placeholder(f"x_{at}") for at in range(len(inputs))]
    constants = {name: graph.get_attr(name) for name in held}
    graph.output(made(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), *places, **constants))
    graph_module = fx.GraphModule(root, graph)
    values = record(graph_module, {str(p.target): x for p, x in zip(places, inputs, strict=True)})
    for node in graph_module.graph.nodes:
        if node.op != "output":
            node.meta["val"] = values[node]
    for name, value in held.items():  # a parameter is one in its own metadata
        next(n for n in graph_module.graph.find_nodes(op="get_attr") if n.target == name).meta["val"] = value
    mark_constants(graph_module.graph)
    return graph_module


def ends(graph_module: fx.GraphModule) -> Any:
    """The node, or nodes, that the graph gives."""
    return graph_module.graph.output_node().args[0]
