"""Operators that write into their inputs, and views, through which a write reaches more than it names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thesean.passes.graph.nodes import is_write


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
