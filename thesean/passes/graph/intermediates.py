"""Look inside a graph: a module that returns named nodes' values, and computes nothing that they do not need."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from thesean.passes.graph.surgery import erase_dead


def intermediates(graph_module: fx.GraphModule, names: Iterable[str], with_output: bool = True) -> fx.GraphModule:
    """A GraphModule that shares parameters and returns `{"output": ..., name: value, ...}`.

    Without the output, everything after the last named node is left out: a prefix of the network.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, mapping)
    by_name = {old.name: new for old, new in mapping.items()}
    result = {name: by_name[name] for name in dict.fromkeys(names)}
    graph.output({"output": output, **result} if with_output else result)
    erase_dead(graph)
    return fx.GraphModule(graph_module, graph)


def names_of(made: fx.GraphModule) -> tuple[str, ...]:
    """What a module that `intermediates` made gives."""
    return tuple(made.graph.output_node().args[0])  # type: ignore[arg-type]
