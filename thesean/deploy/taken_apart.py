"""What torch's exporter makes of an operator before it looks for ONNX forms: the operators that it is composed of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.trace_call import trace_call

aten = torch.ops.aten

# Of memory, sizes and copies into memory, of which nothing is left
_ALIASES = {
    aten.size.default, aten.stride.default, aten.copy_.default, aten.squeeze_.dim, aten.squeeze_.default,
    aten.unsqueeze_.default, aten.transpose_.default,
}  # fmt: skip


def taken_apart(node: fx.Node, has_form: Callable[[Any], bool]) -> set[Any]:
    """The operators left when all is taken apart that has no form, on tensors of the node's own sizes: itself alone
    where torch can't. Nothing is computed.
    """
    table = {op: form for op, form in torch._decomp.decomposition_table.items() if not has_form(op)}
    with torch.no_grad():
        tries = (trace_call(node, node.target, table, as_example=e) for e in (False, True))  # type: ignore[arg-type]
        made = next((graph for graph in tries if graph is not None), None)
    if made is None:
        return {node.target}
    return {_returning(n.target) for n in made.graph.nodes if n.op == "call_function" and n.target not in _ALIASES}


def _returning(target: Any) -> Any:
    """add for add_: the exporter writes into no memory."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return target
    twin = getattr(aten, target._opname.removesuffix("_"), None)
    return getattr(twin, target._overloadname, target)
