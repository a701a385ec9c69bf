"""How far along time the kernels of a graph see: a probe that is shorter than that sees nothing of them.

T time
"""

from __future__ import annotations

import torch
from torch import fx

from thesean.passes.graph.nodes import argument

aten = torch.ops.aten

# operator -> where the dilation stands among its arguments; the kernel is as long as the weight
_CONVOLUTIONS = {aten.conv1d.default: 5, aten.conv1d.padding: 5, aten.conv_transpose1d.default: 7}
_POOLS = (aten.max_pool1d.default, aten.avg_pool1d.default)


def receptive_field(graph: fx.Graph) -> int:
    """Steps to either side that one-dimensional kernels see at most, one after the other: the sum of
    dilation * (size - 1). Attentions and recurrences reach everywhere, and show it at any length.
    """
    return sum(_span(node) for node in graph.nodes)


def _span(node: fx.Node) -> int:
    if node.target in _CONVOLUTIONS:
        weight = node.args[1]
        value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
        size = int(value.shape[-1]) if isinstance(value, torch.Tensor) else 1
        return _only(node, _CONVOLUTIONS[node.target], "dilation") * (size - 1)
    return _only(node, 1, "kernel_size") - 1 if node.target in _POOLS else 0


def _only(node: fx.Node, position: int, name: str) -> int:
    """A size that is written as a number or as a list of one."""
    value = argument(node, position, name, 1)
    value = value[0] if isinstance(value, (list, tuple)) else value
    return value if isinstance(value, int) else 1
