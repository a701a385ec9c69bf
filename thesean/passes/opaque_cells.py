"""Recurrent cells stay one operator while a guide is traced; taken apart, their loop over time fixes the length.

A guide's cell becomes one node a layer, batch first, `aten.lstm`, `aten.gru`, `aten.rnn_tanh` or `aten.rnn_relu`:
operators that run, train and save like any other.

B batch, T time, D width, E units, L layers times directions
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph import erase_dead

aten = torch.ops.aten

_KINDS: dict[Callable[..., Any], str] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
CELLS: dict[Any, str] = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN_TANH",
    aten.rnn_relu.input: "RNN_RELU",
}
_OPERATORS = {
    "lstm": aten.lstm.input, "gru": aten.gru.input, "rnn_tanh": aten.rnn_tanh.input, "rnn_relu": aten.rnn_relu.input
}  # fmt: skip


@torch.library.custom_op("thesean::recurrent", mutates_args=())
def _recurrent(
    x: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    kind: str,
    has_biases: bool,
    layers: int,
    bidirectional: bool,
) -> list[torch.Tensor]:
    """x_BTD -> [y_BTE, last state(s) LBE]; only ever traced."""
    given = list(states) if kind == "lstm" else states[0]
    out = _OPERATORS[kind](x, given, list(weights), has_biases, layers, 0.0, False, bidirectional, True)
    return [v.clone() for v in out]


@_recurrent.register_fake
def _(
    x: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    kind: str,
    has_biases: bool,
    layers: int,
    bidirectional: bool,
) -> list[torch.Tensor]:
    # a projected LSTM puts out the width of its first state, not of its cell
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty(x.shape[0], x.shape[1], width), *[torch.empty_like(s) for s in states]]


class OpaqueCells(TorchFunctionMode):
    """Inside, batched recurrent calls are one operator each; packed sequences are left as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = _KINDS.get(func)
        # batched: (input, hx, weights, has_biases, layers, dropout, train, bidirectional, batch_first)
        if kind is None or kwargs or len(args) != 9 or not isinstance(args[3], bool):
            return func(*args, **(kwargs or {}))
        x, states, weights, has_biases, layers, _, _, bidirectional, batch_first = args
        states = list(states) if kind == "lstm" else [states]
        x_BTD = x if batch_first else x.transpose(0, 1)
        y, *last = torch.ops.thesean.recurrent(x_BTD, states, list(weights), kind, has_biases, layers, bidirectional)
        return (y if batch_first else y.transpose(0, 1), *last)


@dataclass(frozen=True)
class SplitLayers(Pass):
    """recurrent(x, weights of n layers)  =>  n recurrent operators of one layer, batch first, each a node of its own.

    In eval mode nothing stands between layers. A layer's path is its module's with `.l0`, `.l1`..., as in the names of
    its weights, where the module has several.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        stacks = graph.find_nodes(op="call_function", target=torch.ops.thesean.recurrent.default)
        if not stacks:
            return PassResult(graph_module=graph_module, modified=False, reason="the graph has no recurrent cell")
        for stack in stacks:
            _split(graph, stack)
        erase_dead(graph)
        return PassResult(graph_module=graph_module, modified=True)


def _split(graph: fx.Graph, stack: fx.Node) -> None:
    x, states, weights, kind, has_biases, layers, bidirectional = stack.args
    assert isinstance(states, (list, tuple))
    assert isinstance(weights, (list, tuple))
    assert isinstance(layers, int)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // layers
    y_value, *last_values = stack.meta["val"]
    cells: list[fx.Node] = []
    lasts: list[list[fx.Node]] = [[] for _ in states]
    with graph.inserting_before(stack):
        for layer in range(layers):
            owned = _layer_stack(stack, layer) if layers > 1 else _stack(stack)
            rows = slice(layer * directions, (layer + 1) * directions)
            given = [s if layers == 1 else _rows_of(graph, s, rows, owned) for s in states]
            own = list(weights[layer * per_layer : (layer + 1) * per_layer])
            arguments = (x, given if kind == "lstm" else given[0], own, has_biases, 1, 0.0, False, bidirectional, True)
            cell = graph.call_function(_OPERATORS[str(kind)], arguments)
            cell.meta = {"val": (y_value, *(v[rows] for v in last_values)), **owned}
            cells.append(cell)
            items = [graph.call_function(getitem, (cell, index)) for index in range(1 + len(last_values))]
            for item, value in zip(items, cell.meta["val"], strict=True):
                item.meta = {"val": value, **owned}
            x = items[0]
            for collected, item in zip(lasts, items[1:], strict=True):
                collected.append(item)
    assert isinstance(x, fx.Node)
    for item in list(stack.users):  # getitem(stack, index)
        position = item.args[1]
        assert isinstance(position, int)
        if position == 0:
            item.replace_all_uses_with(x)
            continue
        if position == 1:
            for user in list(item.users):
                _last_step(graph, user, cells, directions)
        if item.users:
            item.replace_all_uses_with(_stacked(graph, item, lasts[position - 1]))


def _rows_of(graph: fx.Graph, state: Any, rows: slice, owned: dict[str, Any]) -> fx.Node:
    """One layer's rows of the states (layers times directions, batch, units)."""
    node = graph.call_function(aten.slice.Tensor, (state, 0, rows.start, rows.stop))
    node.meta = {"val": state.meta["val"][rows], **owned}
    return node


def _stacked(graph: fx.Graph, item: fx.Node, layers: list[fx.Node]) -> fx.Node:
    if len(layers) == 1:
        return layers[0]
    with graph.inserting_before(item):
        whole = graph.call_function(aten.cat.default, (layers, 0))
    whole.meta = dict(item.meta)
    return whole


def _last_step(graph: fx.Graph, user: fx.Node, cells: list[fx.Node], directions: int) -> None:
    """h_n[layer]  =>  y[:, -1], that layer's output at its last step (at the first one for the way back).

    So the part ends with the output sequence, which any recurrence can give, and not with one cell's own state.
    """
    count = directions * len(cells)
    if user.target is aten.select.int and user.args[1] == 0:
        row = user.args[2]
    elif user.target is aten.squeeze.dim and user.args[1] in (0, -3) and count == 1:
        row = 0
    else:
        return
    assert isinstance(row, int)
    layer, backwards = divmod(row % count, directions)
    output = next(u for u in cells[layer].users if u.target is getitem and u.args[1] == 0)
    width = user.meta["val"].shape[-1]
    with graph.inserting_before(user):
        step = graph.call_function(aten.select.int, (output, 1, 0 if backwards else -1))
        step.meta = {"val": output.meta["val"][:, 0], **_stack(user)}
        if directions == 2:
            start = width if backwards else 0
            half = graph.call_function(aten.slice.Tensor, (step, 1, start, start + width))
            half.meta = {"val": step.meta["val"][:, start : start + width], **_stack(user)}
            step = half
    user.replace_all_uses_with(step)
    graph.erase_node(user)


def _stack(node: fx.Node) -> dict[str, Any]:
    return {"nn_module_stack": node.meta.get("nn_module_stack", {})}


def _layer_stack(stack: fx.Node, layer: int) -> dict[str, Any]:
    """The module stack of one layer of several: its weights are called weight_ih_l0, so it is `.l0`."""
    modules = dict(stack.meta.get("nn_module_stack", {}))
    if modules:
        key, (path, kind) = list(modules.items())[-1]
        modules[f"{key}.l{layer}"] = (f"{path}.l{layer}", kind)
    return {"nn_module_stack": modules}
