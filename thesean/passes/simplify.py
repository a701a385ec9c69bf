"""Drop what computes nothing: export's asserts, casts to the same type, dropout in eval mode, full slices, a detach of
what no parameter flows into.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import argument, attribute
from thesean.passes.graph.surgery import erase_dead

aten = torch.ops.aten

_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
_ALIASES = (aten.alias.default, aten.lift_fresh_copy.default, aten.detach_.default)


@dataclass(frozen=True)
class Simplify(Pass):
    """op(x) => x, where op is an assert, an alias, an eval-mode dropout, a cast to x's own type or a full slice; and
    transpose(transpose(x)) => x, over the same two dimensions.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        before = len(graph.nodes)
        trained = _trained(graph_module)
        for node in list(graph.nodes):
            if node.op == "get_attr":
                node.meta["val"] = attribute(graph_module, str(node.target))
            elif node.op == "call_module" and str(node.target) == "_guards_fn":
                graph.erase_node(node)
            elif node.target in _ASSERTS:
                graph.erase_node(node)
            elif node.target is aten.transpose.int and (source := _transposed_back(node)) is not None:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
            elif node.op == "call_function" and (_computes_nothing(node) or _stops_nothing(node, trained)):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        erase_dead(graph)
        graph_module.delete_all_unused_submodules()
        removed = before - len(graph.nodes)
        if not removed:
            return PassResult.unchanged(graph_module, "every node computes something")
        return PassResult(graph_module=graph_module, modified=True)


def _transposed_back(node: fx.Node) -> fx.Node | None:
    """x, where `node` is transpose(transpose(x, a, b), a, b)."""
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not aten.transpose.int:
        return None
    rank = node.meta["val"].ndim
    dims = [{argument(n, at, f"dim{at - 1}") % rank for at in (1, 2)} for n in (node, inner)]
    source = inner.args[0]
    return source if dims[0] == dims[1] and isinstance(source, fx.Node) else None


def _trained(graph_module: fx.GraphModule) -> set[fx.Node]:
    """What hangs on a parameter or on a module; empty where the graph has no detach to ask for it."""
    found: set[fx.Node] = set()
    graph = graph_module.graph
    if not graph.find_nodes(op="call_function", target=aten.detach.default):
        return found
    for node in graph.nodes:
        reads = node.op == "get_attr" and isinstance(attribute(graph_module, str(node.target)), torch.nn.Parameter)
        if reads or node.op == "call_module" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _stops_nothing(node: fx.Node, trained: set[fx.Node]) -> bool:
    return node.target is aten.detach.default and node.args[0] not in trained


def _computes_nothing(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target in _ALIASES:
        return True
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return node.args[2] is False
    have, want = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(have, torch.Tensor) and isinstance(want, torch.Tensor)):
        return False
    if node.target in (aten.to.dtype_layout, aten.to.dtype, aten.to.device, aten._to_copy.default):
        return have.dtype == want.dtype and have.device == want.device
    if node.target is aten.slice.Tensor:
        start, end = argument(node, 2, "start"), argument(node, 3, "end")
        size = have.shape[argument(node, 1, "dim", 0)]
        from_start = start in (None, 0) or _is(start, -size)  # x[:, -x.shape[1]:]
        return from_start and (end in (None, sys.maxsize) or _is(end, size)) and argument(node, 4, "step", 1) == 1
    return False


def _is(value: Any, size: int | torch.SymInt) -> bool:
    """Whether a computed number is this one, whatever the sizes of the inputs are. What a slice gives doesn't
    tell: that is the size in the example's range, which no guard may hold.
    """
    if not isinstance(value, fx.Node):
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy, which takes a second

    return bool(statically_known_true(value.meta.get("val") == size))
