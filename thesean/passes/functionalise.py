"""Operators that write into their input become operators that return: a recorded value must stay what it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import is_write


@dataclass(frozen=True)
class Functionalise(Pass):
    """y = op_(x)  =>  y = op(x), and whatever reads x later reads y, as it would in memory.

    What a forward would leave behind in its inputs and buffers is left out: neither is ours to change. Writes into a
    view of another tensor stay: what else they reach can't be read off one node. `writes` finds them.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        order = {n: i for i, n in enumerate(graph_module.graph.nodes)}
        changed = False
        for node in list(graph_module.graph.nodes):
            if _leaves_a_result_behind(node, order):
                graph_module.graph.erase_node(node)
                changed = True
                continue
            twin = twin_of(node)
            if twin is None or not _owns_memory(node.args[0], order[node], order):
                continue
            source = node.args[0]
            node.target = twin
            later = [u for u in source.users if order[u] > order[node]]
            for user in later:
                user.replace_input_with(source, node)
            changed = True
        if not changed:
            return PassResult.unchanged(graph_module, "no operator writes into its input")
        return PassResult(graph_module=graph_module, modified=True)


def _leaves_a_result_behind(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """A last copy into an input or a buffer, for the caller or for the next call to find: torch.export puts it there
    when a forward wrote into it. Neither is ours to change.
    """
    if node.target is not torch.ops.aten.copy_.default or node.users:
        return False
    kept = node.args[0]
    return (
        isinstance(kept, fx.Node)
        and kept.op in ("placeholder", "get_attr")
        and max(map(order.__getitem__, kept.users)) == order[node]
        and _owns_memory(kept, order[node], order)
    )


def writes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The operators that write into one of their inputs."""
    return [n for n in graph_module.graph.nodes if is_write(n)]


def twin_of(node: fx.Node) -> Any:
    """The operator that returns what `node` writes into its first argument: add for add_."""
    target = node.target
    if not (isinstance(target, torch._ops.OpOverload) and is_write(node)):
        return None
    name = target._opname
    if target.namespace != "aten" or not name.endswith("_") or not isinstance(node.args[0], fx.Node):
        return None
    twin = getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, None)
    if twin is None or [a.name for a in twin._schema.arguments[1:]] != [a.name for a in target._schema.arguments[1:]]:
        return None
    have, want = node.args[0].meta.get("val"), node.meta.get("val")
    # x += y keeps the dtype and shape of x; x + y may widen them
    if not (isinstance(have, torch.Tensor) and isinstance(want, torch.Tensor) and have.dtype == want.dtype):
        return None
    operands = [i.meta.get("val") for i in node.all_input_nodes[1:]]
    widens = any(isinstance(v, torch.Tensor) and v.ndim > 0 and v.dtype != have.dtype for v in operands)
    return None if widens and name not in ("index_put_", "masked_fill_", "copy_") else twin


def _owns_memory(source: Any, now: int, order: dict[fx.Node, int]) -> bool:
    """Whether nothing that shares memory with `source` is read after the write, but `source` itself.

    A buffer that a forward writes to (a counter) keeps its value from call to call no longer: a graph has no memory.
    """
    front = [_origin(source)]
    for shared in front:
        if shared is not source and any(order[reader] > now for reader in shared.users):
            return False
        front.extend(u for u in shared.users if is_view(u) and order[u] < now)
    return True


def _origin(node: fx.Node) -> fx.Node:
    """What a view, or a view of it, is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_view(node: fx.Node) -> bool:
    """May share memory with an input: its schema says so, or it takes an element out of a list of views."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return bool(node.all_input_nodes) and is_view(node.all_input_nodes[0])
    aliased = any(r.alias_info is not None and not r.alias_info.is_write for r in node.target._schema.returns)
    return aliased or node.target in MAYBE_VIEWS


MAYBE_VIEWS = (
    torch.ops.aten.reshape.default, torch.ops.aten.flatten.using_ints, torch.ops.aten.contiguous.default,
    torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout, torch.ops.aten.to.device, torch.ops.aten.unflatten.int,
    torch.ops.aten.chunk.default, torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default,
)  # fmt: skip
