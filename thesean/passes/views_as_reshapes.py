"""Views hang on how memory lies, which is another way once an operator before them is replaced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class ViewsAsReshapes(Pass):
    """view(x, sizes)  =>  reshape(x, sizes)

    Attention's kernel lays out its rows so that turned dimensions are a view, a guide's `.contiguous()` does nothing
    there and is not traced, and torch's functionalisation makes views of reshapes. Kernels that keep something for
    gradients, and what takes an attention's place, lay out in other ways.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        views = [n for n in graph_module.graph.nodes if n.target in _VIEWS]
        for node in views:
            node.target = aten.reshape.default
        if not views:
            return PassResult.unchanged(graph_module, "no view hangs on how memory lies")
        return PassResult(graph_module=graph_module, modified=True)
