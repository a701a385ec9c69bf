"""A guide's own recurrences of matrices become modules: as such they carry a state, and are written as one operator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.kept_memory import KeptMemory
from thesean.passes.graph.opaque_memories import MEMORIES
from thesean.passes.graph.running import run_instead
from thesean.passes.graph.surgery import beside, erase_dead, free_names


@dataclass(frozen=True)
class MemoriesAsModules(Pass):
    """y = thesean.gated_delta_rule(q, k, v, b, g)  =>  y, s = memory(q, k, v, b, g), a KeptMemory.

    The same for thesean.state_space and thesean.selective_scan. ThreadState threads the state; where nothing is
    carried on it starts as zeros. The new graph shares its parameters with the incoming one, which stays as it was.
    """

    in_place = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not _memories(graph_module.graph):
            return PassResult.unchanged(graph_module, "the graph has no recurrence of matrices")
        new = beside(graph_module)
        names = free_names(new, "memory")
        for node in _memories(new.graph):
            run_instead(new, node, KeptMemory(MEMORIES[node.target]), next(names))
        erase_dead(new.graph)
        new.recompile()
        new.train(graph_module.training)
        return PassResult(graph_module=new, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        self._expect(not _memories(graph_module.graph), "no recurrence of matrices to be left")


def _memories(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target in MEMORIES]
