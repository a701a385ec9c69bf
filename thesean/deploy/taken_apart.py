"""What torch's exporter makes of an operator before it looks for ONNX forms: the operators that it is composed of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

logger = logging.getLogger(__name__)

aten = torch.ops.aten

# Of memory, sizes and copies into memory, of which nothing is left
_ALIASES = {aten.size.default, aten.copy_.default, aten.squeeze_.dim, aten.squeeze_.default, aten.unsqueeze_.default}


def taken_apart(node: fx.Node, has_form: Callable[[Any], bool]) -> set[Any]:
    """The operators left when all is taken apart that has no form, on tensors of the node's own sizes: itself alone
    where torch can't. Nothing is computed.
    """
    inputs = node.all_input_nodes
    values = [i.meta.get("val") for i in inputs]
    mode = detect_fake_mode(values) or FakeTensorMode()
    given = [v if isinstance(v, FakeTensor) or not isinstance(v, torch.Tensor) else mode.from_tensor(v) for v in values]

    def of_inputs(*values: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), dict(zip(inputs, values, strict=True)).__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    table: Any = {op: form for op, form in torch._decomp.decomposition_table.items() if not has_form(op)}
    try:
        with mode, torch.no_grad():
            made = make_fx(of_inputs, table)(*given)
    except Exception as error:  # the tracer raises whatever it meets
        logger.debug("%s is not taken apart: %s", node.target, error)
        return {node.target}
    return {_returning(n.target) for n in made.graph.nodes if n.op == "call_function" and n.target not in _ALIASES}


def _returning(target: Any) -> Any:
    """add for add_: the exporter writes into no memory."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return target
    twin = getattr(aten, target._opname.removesuffix("_"), None)
    return getattr(twin, target._overloadname, target)
