"""A copy to write into a file: on the CPU, in eval mode, without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.surgery import frozen


@dataclass(frozen=True)
class FreezeOnCpu(Pass):
    """arange(n, device="cuda")  =>  arange(n, device="cpu"), in a copy whose flags are its own.

    The copy is on the CPU, in eval mode and requires no gradients; whatever it computes is computed there. Weights that
    are on the CPU already are in memory once: nothing may write into those of the copy.
    """

    in_place = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        module = frozen(graph_module).eval()
        for node in module.graph.nodes:
            if isinstance(node.kwargs.get("device"), torch.device):
                node.update_kwarg("device", torch.device("cpu"))
        return PassResult(graph_module=module, modified=True)
