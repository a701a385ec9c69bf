"""What an export will refuse, asked before training and without one: operators that have no form in ONNX, in
milliseconds; and for a network that looks ahead the stream that it is meant to be.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean.deploy.decomposing import stays
from thesean.deploy.export_passes import streaming
from thesean.deploy.lowering.to_onnx import quiet
from thesean.deploy.taken_apart import taken_apart
from thesean.deploy.torchlib import is_registered, is_registered_for_complex
from thesean.errors import PassRefused
from thesean.passes.base import run_passes
from thesean.passes.graph.nodes import argument, is_complex, owner
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.graph.opaque_memories import MEMORIES
from thesean.passes.graph.running_fold import fold_of
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.stream import looks_ahead
from thesean.passes.graph.trace_call import is_composed
from thesean.passes.slices_of_joins import SlicesOfJoins
from thesean.passes.write_out_for_onnx import form_of

aten = torch.ops.aten


def unwritable(graph_module: fx.GraphModule) -> str:
    """What stands in the way of an export, "" where nothing is known to: the operators that torch can neither write nor
    take apart, with the parts that they are in. "" without the extra, whose table says so.
    """
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    sure: dict[str, bool] = {}
    calls = [n for n in nodes if not _is_sure(n, sure)]
    looked_up = [n for n in calls if _is_torchs(n.target)]
    complex_ones = [n for n in nodes if _is_torchs(n.target) and any(map(is_complex, n.all_input_nodes))]
    if looked_up or complex_ones:  # only now: to read the table takes two seconds
        if importlib.util.find_spec("onnxscript") is None:
            return ""
        with quiet():
            made = {n: taken_apart(n, is_registered) for n in looked_up}
            written = {n for n, ops in made.items() if all(not _is_operator(op) or is_registered(op) for op in ops)}
            calls = [n for n in calls if n not in written]
            # one that has a form is not taken apart, be that of real numbers alone
            calls += [
                n
                for n in complex_ones
                if n not in calls
                and form_of(n) is None
                and stays(n.target, is_registered)
                and not is_registered_for_complex(n.target)
            ]
    calls += [n for n in nodes if _fails(n)]
    found: dict[str, str] = {}
    for node in calls:
        place = owner(node)
        found.setdefault(str(node.target), f"{node.target}{f' in {place}' if place else ''}")
    if not found:
        return ""
    return (
        f"no ONNX form is known of {', '.join(found.values())}: an export will fail there, unless that part is replaced"
    )


def unstreamable(graph_module: fx.GraphModule, signature: Signature) -> str:
    """Why a network whose parts look ahead can't carry a state, "" where it can or none does."""
    if not looks_ahead(graph_module):
        return ""
    try:
        run_passes(graph_module, SlicesOfJoins(), *streaming(signature, ahead=True))
    except PassRefused as refusal:
        return (
            f"parts look ahead, and the network is no stream all the same: {refusal} An export has no state then; "
            "bring whole sequences to the file, or convert what is left."
        )
    return ""


def _fails(node: fx.Node) -> bool:
    """What torch takes apart, and can't write then: until it does (2.13)."""
    if node.target in (aten.fft_fftshift.default, aten.fft_ifftshift.default):
        shape = node.meta["val"].shape  # rolled by half of each
        return not all(isinstance(shape[d], int) for d in argument(node, 1, "dim") or range(len(shape)))
    if node.target is aten.lstm.input:
        hidden, cell = (n.meta["val"].shape[-1] for n in node.args[1])  # type: ignore[union-attr]
        return hidden != cell  # a projection, which ONNX's has not
    if node.target is aten.roll.default:
        return any(isinstance(shift, fx.Node) for shift in pytree.tree_leaves(node.args[1]))
    return node.target is aten.istft.default  # scatters by int32, which no file may


def _is_operator(target: object) -> bool:
    return isinstance(target, torch._ops.OperatorBase)


def _is_torchs(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and target not in CELLS


def _is_sure(node: fx.Node, known: dict[str, bool]) -> bool:
    """One of torch's core operators, one that it takes apart to these, what is a module in an export, or arithmetic on
    sizes. `known`: of operators with such arguments.
    """
    target: Any = node.target
    if not _is_torchs(target):
        return not _is_operator(target) or target in CELLS or target in MEMORIES
    if _is_core(target) or form_of(node) or fold_of(node) or target is aten.scaled_dot_product_attention.default:
        return True  # the form is our own where it isn't torch's
    if any(i.meta.get("val") is None for i in node.all_input_nodes):  # what a replacement gives: only looked up
        return is_composed(target)
    given = fx.map_arg((node.args, node.kwargs), lambda n: str(getattr(n.meta.get("val"), "dtype", n.name)))
    call = f"{target}{given}"
    if call not in known:
        known[call] = all(not _is_operator(t) or _is_core(t) for t in taken_apart(node, _is_core))
    return known[call]


def _is_core(target: Any) -> bool:
    return torch.Tag.core in getattr(target, "tags", ())
