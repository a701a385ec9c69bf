"""A module that runs over all steps so far, in place of an operator that does."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx, nn

from thesean.passes.graph.nodes import argument

aten = torch.ops.aten

_OF_TWO = {aten.cummax.default, aten.cummin.default}  # values, and the places where they are


def values_of(node: fx.Node) -> list[fx.Node]:
    """What has the values of a running operator: itself, or those that take the first of its two results."""
    return [user for user in node.users if not user.args[1]] if node.target in _OF_TWO else [node]


def places_read(node: fx.Node) -> bool:
    """Whether anything reads the second one."""
    return node.target in _OF_TWO and any(user.args[1] and user.users for user in node.users)


def run_instead(graph_module: fx.GraphModule, node: fx.Node, module: nn.Module, name: str) -> None:
    """y = op(x, dim)  =>  y, state = module(x), and of as many tensors as the module `reads`. The operator stays, for
    whoever erases what nothing reads.
    """
    graph, reads = graph_module.graph, getattr(module, "reads", 1)
    given = node.args[:reads] if reads > 1 else (argument(node, 0, "self"),)
    graph_module.add_submodule(name, module)
    with graph.inserting_before(node):
        if (dtype := node.kwargs.get("dtype")) is not None:
            given = (graph.call_function(aten.to.dtype, (*given, dtype)),)
        call = graph.call_module(name, given)
        y = graph.call_function(getitem, (call, 0))
    call.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    for value in values_of(node):
        y.meta = {k: v for k, v in value.meta.items() if k in ("val", "nn_module_stack")}
        value.replace_all_uses_with(y)
