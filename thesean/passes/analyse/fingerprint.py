"""Equal for regions that compute alike: by operators, shapes and wiring, or to the last argument."""

from __future__ import annotations

import torch
from torch import fx

from thesean.passes.analyse.regions import VIEWS, Region


def fingerprint(segment: Region) -> object:
    """Operators, shapes and wiring."""
    index: dict[fx.Node, int] = {segment.entry: -1} | {n: i for i, n in enumerate(segment.nodes)}
    rows = []
    for node in segment.nodes:
        wires = tuple(index.get(i, _outside(i)) for i in node.all_input_nodes)
        rows.append((str(node.target), _shape(node), wires))
    return tuple(rows)


def operator_kinds(segment: Region) -> object:
    """The set of operators that compute, whatever their number and sizes."""
    return frozenset(str(n.target) for n in segment.nodes if n.target not in VIEWS)


def _outside(node: fx.Node) -> object:
    return ("parameter", _shape(node)) if node.op == "get_attr" else "side"


def _shape(node: fx.Node) -> tuple[object, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    # the expression itself: printing it would take longer than all the rest of a signature
    return tuple(d.node.expr if isinstance(d, torch.SymInt) else d for d in value.shape)


def exact_fingerprint(region: Region) -> str:
    """Operators, wiring and all arguments; parameters by their shapes, any other outside node (a mask) by its name."""
    index = {region.entry: "entry"} | {n: f"%{i}" for i, n in enumerate(region.nodes)}

    def name(node: fx.Node) -> str:
        value = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, torch.nn.Parameter):
            return f"parameter {tuple(value.shape)}"
        return index.get(node, node.name)

    rows = ((n.target, n.op, fx.map_arg(n.args, name), fx.map_arg(n.kwargs, name)) for n in region.nodes)
    return repr([*rows, str(region.entry.meta["val"].shape)])
