"""Recurrent cells -> ONNX operators: what torch's exporter can't write with a dynamic length or a given state.

B batch, T time, D width, L layers times directions, H heads, F features of a key, K width of a value
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from thesean.deploy.lowering.cells import LoweredCell, LoweredLinearAttention, LoweredLinearRecurrence
from thesean.deploy.lowering.scans import (
    LoweredCausalConvolution,
    LoweredDeltaRule,
    LoweredDiagonalScan,
    LoweredLeakyRecurrence,
)
from thesean.deploy.lowering.window import LoweredWindowAttention
from thesean.passes.graph.nodes import attribute
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.graph.surgery import clone
from thesean.targets.shared.cores import (
    CausalConvolutionCore,
    DeltaRuleCore,
    DiagonalScanCore,
    LeakyRecurrence,
    LinearAttentionCore,
    LinearRecurrence,
    WindowAttentionCore,
)


def lower_cells(module: nn.Module, *, opset: int = 18, path: str = "") -> nn.Module:
    """A frozen deep copy of `module` whose recurrent cells emit ONNX operators under `torch.onnx.export(dynamo=True)`.

    nn.RNN, nn.GRU and nn.LSTM become RNN, GRU and LSTM; LinearRecurrence and LeakyRecurrence become Scan;
    LinearAttentionCore, DeltaRuleCore and DiagonalScanCore become com.microsoft::LinearAttention, CausalConvolutionCore
    com.microsoft::CausalConvWithState, and WindowAttentionCore a function that `window_function.define` adds to the
    model. All keep dynamic batch and length; example sizes must be 2 or more. `opset` is the one that the export will
    ask for. Run outside an export, the copy raises ExportError. Raises ExportError for a cell without an ONNX form (an
    LSTM with projections), naming its path.
    """
    # One cell used in two places stays one cell. The original is kept beside its stand-in, or its id would be reused.
    lowered: dict[int, tuple[nn.Module, nn.Module]] = {}

    def lower(child: nn.Module, where: str) -> nn.Module:
        if id(child) not in lowered:
            replacement = _lowered(child, where, opset)
            lowered[id(child)] = (child, child if replacement is None else replacement)
            if replacement is None:
                for name, grandchild in list(child._modules.items()):  # named_children() skips repeated ones
                    if grandchild is not None:
                        setattr(child, name, lower(grandchild, f"{where}.{name}" if where else name))
        return lowered[id(child)][1]

    # without gradients: torch 2.13's scan warns about .grad of inner tensors when it traces a trainable graph
    return lower(copy.deepcopy(module).requires_grad_(False), path)


def cells_as_modules(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which a guide's own recurrent operators (aten.lstm and its kin) are calls of nn.LSTM and its kin.

    As modules `lower_cells` finds them; as operators the exporter would take them apart and fix the length.
    """
    if not any(n.target in CELLS for n in graph_module.graph.nodes):
        return graph_module
    new = clone(graph_module)
    for number, node in enumerate([n for n in new.graph.nodes if n.target in CELLS]):
        name = f"cell_{number}"
        while hasattr(new, name):
            name += "_"
        x, states, weights, has_biases, _, _, _, bidirectional, batch_first = node.args
        tensors = [attribute(new, str(w.target)) for w in weights]
        new.add_submodule(name, _cell(CELLS[node.target], tensors, has_biases, bidirectional, batch_first))
        given = tuple(states) if isinstance(states, (list, tuple)) else states
        with new.graph.inserting_before(node):
            call = new.graph.call_module(name, (x, given))
        call.meta = dict(node.meta)
        for item in list(node.users):
            _read_state(new.graph, item, call, pair=CELLS[node.target] == "LSTM")
        new.graph.erase_node(node)
    new.recompile()
    return new


def _cell(
    kind: str, tensors: list[torch.Tensor], has_biases: bool, bidirectional: bool, batch_first: bool
) -> nn.RNNBase:
    """One layer with these weights, in torch's own order."""
    per_direction = len(tensors) // (2 if bidirectional else 1)
    projected = per_direction % 2 == 1  # matrices and biases come in pairs; a projection is one more
    settings: dict[str, Any] = dict(bias=has_biases, bidirectional=bidirectional, batch_first=batch_first)
    if projected:
        settings["proj_size"] = tensors[per_direction - 1].shape[0]
    if kind.startswith("RNN"):
        settings["nonlinearity"] = kind.removeprefix("RNN_").lower()
    make = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(kind, nn.RNN)
    gates = {"LSTM": 4, "GRU": 3}.get(kind, 1)
    cell = make(tensors[0].shape[1], tensors[0].shape[0] // gates, **settings)
    with torch.no_grad():
        for parameter, value in zip(cell._flat_weights, tensors, strict=True):
            parameter.copy_(value)
    return cell.eval()


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


def _lowered(module: nn.Module, path: str, opset: int) -> nn.Module | None:
    for kind, make in _FORMS.items():
        if isinstance(module, kind):
            return make(module, path, opset)
    return None


_FORMS: dict[type[nn.Module], Callable[[Any, str, int], nn.Module]] = {
    nn.RNNBase: LoweredCell,
    LinearRecurrence: lambda module, path, opset: LoweredLinearRecurrence(path),
    LinearAttentionCore: lambda module, path, opset: LoweredLinearAttention(path),
    DeltaRuleCore: lambda module, path, opset: LoweredDeltaRule(path),
    DiagonalScanCore: lambda module, path, opset: LoweredDiagonalScan(path),
    CausalConvolutionCore: lambda module, path, opset: LoweredCausalConvolution(path),
    LeakyRecurrence: lambda module, path, opset: LoweredLeakyRecurrence(path),
    WindowAttentionCore: lambda module, path, opset: LoweredWindowAttention(path),
}
