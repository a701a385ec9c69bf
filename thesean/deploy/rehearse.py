"""Which operators of a network have no form in ONNX: asked before training, in milliseconds and not with an export."""

from __future__ import annotations

import importlib.util

import torch
from torch import fx

from thesean.deploy.lowering.to_onnx import quiet
from thesean.deploy.torchlib import is_registered
from thesean.passes.graph.nodes import owner
from thesean.passes.graph.opaque_cells import CELLS


def unwritable(graph_module: fx.GraphModule) -> str:
    """What stands in the way of an export, "" where nothing is known to: the operators that torch can neither write nor
    take apart, with the parts that they are in. "" without the extra, whose table says so.
    """
    calls = [n for n in graph_module.graph.nodes if n.op == "call_function" and not _surely_written(n.target)]
    aten = [n for n in calls if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "aten"]
    if aten:  # only now: to read the table takes two seconds
        if importlib.util.find_spec("onnxscript") is None:
            return ""
        with quiet():
            calls = [n for n in calls if n not in aten or not is_registered(n.target)]
    found: dict[str, str] = {}
    for node in calls:
        place = owner(node)
        found.setdefault(str(node.target), f"{node.target}{f' in {place}' if place else ''}")
    if not found:
        return ""
    return (
        f"no ONNX form is known of {', '.join(found.values())}: an export will fail there, unless that part is replaced"
    )


def _surely_written(target: object) -> bool:
    """One of torch's core operators, one that it takes apart to these, a cell, or arithmetic on sizes."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if not isinstance(target, torch._ops.OpOverload) or target in CELLS:
        return True
    if target.namespace != "aten":
        return False
    if torch.Tag.core in target.tags or target in torch._decomp.decomposition_table:
        return True
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))
