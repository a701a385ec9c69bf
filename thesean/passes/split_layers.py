"""A recurrent stack becomes one operator a layer, so that each layer can be a part."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.opaque_cells import OPERATORS
from thesean.passes.graph.surgery import erase_dead

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitLayers(Pass):
    """recurrent(x, weights of n layers)  =>  n recurrent operators of one layer, batch first, each a node of its own.

    In eval mode nothing stands between layers. A layer's path is its module's with `.l0`, `.l1`..., as in the names of
    its weights, where the module has several.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        stacks = graph.find_nodes(op="call_function", target=torch.ops.thesean.recurrent.default)
        if not stacks:
            return PassResult.unchanged(graph_module, "the graph has no recurrent cell")
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
            cell = graph.call_function(OPERATORS[str(kind)], arguments)
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
