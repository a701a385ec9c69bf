"""Give each recurrent cell of a guide's own that is left its hidden state as state.

B batch, T time, E units
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from thesean.passes.analyse.recurrence import starts_anew
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.clock import NO_TIME, has_one_time
from thesean.passes.graph.kept_cell import KeptCell, cell_with
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import argument, attribute, leaf_nodes
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import beside, erase_dead, free_names
from thesean.passes.graph.two_sizes import TwoSizes

aten = torch.ops.aten


@dataclass(frozen=True)
class CarryCells(Pass):
    """y, h = aten.gru(x, zeros, weights)  =>  y, h = cell(x), and the same for aten.lstm, rnn_tanh and rnn_relu.

    `cell` is a module that carries a state, for ThreadState to thread: h, (B, E), and of an LSTM c as well, zeros at
    the start; of one that starts from what was learnt, the same in each row, how far they are from there. A cell that
    reads both ways, or starts from what the caller gives, stays. The new graph shares its parameters with the incoming
    one, which stays as it was.
    """

    in_place = False

    signature: Signature

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not has_one_time(self.signature):
            return PassResult.unchanged(graph_module, NO_TIME)
        none = PassResult.unchanged(
            graph_module, "no recurrent cell reads time from the front on, from where it always starts"
        )
        if CELLS.keys().isdisjoint(n.target for n in graph_module.graph.nodes):
            return none
        new = beside(graph_module)
        graph = new.graph
        with evaluating(new):
            two = TwoSizes(new, self.signature)
        found = [
            (n, start)
            for n in graph.nodes
            if n.target in CELLS
            and two.time_dim(n.args[0]) == 1
            and not argument(n, 7, "bidirectional")
            and all(w.op == "get_attr" for w in argument(n, 2, "params"))
            and (start := _start(n, two)) is not None
        ]
        if not found:
            return none
        names = free_names(new, "kept")
        for (node, start), name in zip(found, names, strict=False):
            _replace(new, node, start, name)
        erase_dead(graph)
        new.recompile()
        new.train(graph_module.training)
        return PassResult(graph_module=new, modified=True)


def _start(cell: fx.Node, two: TwoSizes) -> list[torch.Tensor] | None:
    """What each state of a cell starts from, a row of it; none for zeros. None where rows or runs start otherwise."""
    states = leaf_nodes(cell.args[1])
    if not all(map(starts_anew, states)):
        return None
    rows = [[run[state][0] for run in two.runs] for state in states]  # of one layer, (B, E)
    if not any(bool(row.any()) for found in rows for row in found):
        return []
    alike = all(torch.equal(row, found[0][:1].expand_as(row)) for found in rows for row in found)
    given_away = any(item.args[1] for item in cell.users)  # which is no distance from the start
    return None if given_away or not alike else [found[0][0].detach().clone() for found in rows]


def _replace(graph_module: fx.GraphModule, node: fx.Node, start: list[torch.Tensor], name: str) -> None:
    graph = graph_module.graph
    tensors = [attribute(graph_module, str(w.target)) for w in argument(node, 2, "params")]
    core = cell_with(CELLS[node.target], tensors, argument(node, 3, "has_biases"), False, True)
    for weight, tensor in zip(core._flat_weights_names, tensors, strict=True):
        if isinstance(tensor, nn.Parameter):
            setattr(core, weight, tensor)
    graph_module.add_submodule(name, KeptCell(core, start))
    with graph.inserting_before(node):
        call = graph.call_module(name, (node.args[0],))
    call.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    for item in list(node.users):
        _read(graph, item, call, pair=isinstance(core, nn.LSTM))
    graph.erase_node(node)


def _read(graph: fx.Graph, item: fx.Node, call: fx.Node, pair: bool) -> None:
    """getitem(operator, k)  =>  the same of the module's (y, h) or (y, (h, c))."""
    index: Any = item.args[1]
    with graph.inserting_before(item):
        found = graph.call_function(getitem, (call, min(index, 1)))
        if index and pair:
            found = graph.call_function(getitem, (found, index - 1))
        if index:
            found = graph.call_function(aten.unsqueeze.default, (found, 0))
    found.meta = {k: v for k, v in item.meta.items() if k in ("val", "nn_module_stack")}
    item.replace_all_uses_with(found)
    graph.erase_node(item)
