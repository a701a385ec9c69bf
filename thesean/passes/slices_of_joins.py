"""A slice that is one of the pieces of what it is cut out of becomes that piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.surgery import beside, erase_dead

aten = torch.ops.aten


@dataclass(frozen=True)
class SlicesOfJoins(Pass):
    """slice(cat([a, b], d), d, a.shape[d], a.shape[d] + b.shape[d])  =>  b

    The new graph shares its parameters with the incoming one, which stays as it was.
    """

    in_place = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not any(_piece(node) for node in graph_module.graph.nodes):
            return PassResult.unchanged(graph_module, "no slice is a piece of what was joined")
        new = beside(graph_module)
        for node in list(new.graph.nodes):
            if (piece := _piece(node)) is not None:
                node.replace_all_uses_with(piece)
        erase_dead(new.graph)
        new.recompile()
        return PassResult(graph_module=new, modified=True)


def _piece(node: fx.Node) -> fx.Node | None:
    joined = node.args[0] if node.target is aten.slice.Tensor else None
    if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default or argument(node, 4, "step", 1) != 1:
        return None
    value = joined.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    dim = argument(joined, 1, "dim", 0) % value.ndim
    wanted = (argument(node, 2, "start"), argument(node, 3, "end"))
    if argument(node, 1, "dim", 0) % value.ndim != dim or not all(isinstance(n, int) and n >= 0 for n in wanted):
        return None
    start = 0
    for piece in argument(joined, 0, "tensors"):
        size = piece.meta["val"].shape[dim]
        if not isinstance(size, int):
            return None
        if wanted == (start, start + size):
            found: fx.Node = piece
            return found
        start += size
    return None
