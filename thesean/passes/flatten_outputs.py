"""One flat tuple in place of the guide's nested output, as a file has its outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import leaf_nodes


@dataclass(frozen=True)
class FlattenOutputs(Pass):
    """return {"a": x, "b": (y, z)}  =>  return (x, y, z). The new graph shares its parameters with the one it is of."""

    in_place = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nested = graph_module.graph.output_node().args[0]
        if isinstance(nested, tuple) and all(isinstance(v, fx.Node) for v in nested):
            return PassResult.unchanged(graph_module, "the output is a flat tuple already")
        graph = fx.Graph()
        output = graph.graph_copy(graph_module.graph, {})
        graph.output(tuple(leaf_nodes(output)))
        flat = fx.GraphModule(graph_module, graph)
        flat.meta.update(graph_module.meta)
        flat.train(graph_module.training)
        return PassResult(graph_module=flat, modified=True)
