"""A guide's own recurrent operators become modules again: an exporter would take the operators apart."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import fx

from thesean.errors import PassRefused
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.kept_cell import cell_with
from thesean.passes.graph.nodes import argument, attribute
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.graph.surgery import clone


@dataclass(frozen=True)
class CellsAsModules(Pass):
    """y, h = aten.gru(x, h0, weights)  =>  y, h = cell_0(x, h0), where cell_0 is an nn.GRU with these weights.

    The same for aten.lstm, aten.rnn_tanh and aten.rnn_relu. As modules they can be written as one ONNX operator each;
    as operators torch's exporter takes them apart and fixes the length. The new graph is a copy.
    """

    in_place = False

    def requires(self, graph_module: fx.GraphModule) -> None:
        for node in _cells(graph_module.graph):
            for weight in argument(node, 2, "params"):
                if weight.op != "get_attr":
                    raise PassRefused(
                        f"cells as modules: {node.name}: expected weights that are parameters, found "
                        f"{weight.name}, which is computed."
                    )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not _cells(graph_module.graph):
            return PassResult.unchanged(graph_module, "the graph has no recurrent operator")
        new = clone(graph_module)
        for number, node in enumerate(_cells(new.graph)):
            name = f"cell_{number}"
            while hasattr(new, name):
                name += "_"
            _call_module(new, node, name)
        return PassResult(graph_module=new, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        self._expect(not _cells(graph_module.graph), "no recurrent operator to be left")


def _cells(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target in CELLS]


def _call_module(graph_module: fx.GraphModule, node: fx.Node, name: str) -> None:
    graph, kind = graph_module.graph, CELLS[node.target]
    arguments: Any = node.args
    x, states, weights, has_biases, _, _, _, bidirectional, batch_first = arguments
    tensors = [attribute(graph_module, str(w.target)) for w in weights]
    graph_module.add_submodule(name, cell_with(kind, tensors, has_biases, bidirectional, batch_first))
    given = tuple(states) if isinstance(states, (list, tuple)) else states
    with graph.inserting_before(node):
        call = graph.call_module(name, (x, given))
    call.meta = dict(node.meta)
    for item in list(node.users):
        _read_state(graph, item, call, pair=kind == "LSTM")
    graph.erase_node(node)


def _read_state(graph: fx.Graph, item: fx.Node, call: fx.Node, pair: bool) -> None:
    """getitem(operator, k)  =>  the same of the module's (y, state) or (y, (h, c))."""
    index = item.args[1]
    assert isinstance(index, int)
    with graph.inserting_before(item):
        found = graph.call_function(getitem, (call, min(index, 1)))
        if index and pair:
            found = graph.call_function(getitem, (found, index - 1))
    item.replace_all_uses_with(found)
    graph.erase_node(item)
