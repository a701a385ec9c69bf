"""Products, sums of exponentials, largest and least values of all numbers so far become modules: ONNX has no operator
of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.running import run_instead
from thesean.passes.graph.running_fold import RunningFold, fold_of
from thesean.passes.graph.surgery import erase_dead, free_names


@dataclass(frozen=True)
class FoldsAsModules(Pass):
    """y = aten.logcumsumexp(x, dim)  =>  y, last = fold_1(x), a RunningFold along this dimension.

    The same for aten.cumprod, and for the values of aten.cummax and aten.cummin. As modules they are written as a scan;
    torch's exporter knows one of the four, whose form loses all that is far below the largest number.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, names = graph_module.graph, free_names(graph_module, "fold")
        found = [(node, fold) for node in graph.nodes if (fold := fold_of(node)) is not None]
        if not found:
            return PassResult.unchanged(graph_module, "nothing is folded over all numbers so far")
        for node, fold in found:
            dim = argument(node, 1, "dim") % argument(node, 0, "self").meta["val"].ndim
            run_instead(graph_module, node, RunningFold(dim, fold), next(names))
        erase_dead(graph)
        return PassResult(graph_module=graph_module, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        self._expect(not any(map(fold_of, graph_module.graph.nodes)), "no such operator to be left")
