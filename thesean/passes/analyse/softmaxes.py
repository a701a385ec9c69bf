"""How a softmax is written."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_LARGEST = (aten.max.dim, aten.amax.default)


def less_its_largest(node: fx.Node) -> fx.Node | None:
    """x, where the node is x - max(x), of which a softmax sees no difference."""
    if node.target is not aten.sub.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    whole, largest = node.args[:2]
    while isinstance(largest, fx.Node) and largest.target in (getitem, aten.detach.default):
        largest = largest.args[0]
    taken = isinstance(largest, fx.Node) and largest.target in _LARGEST and largest.args[0] is whole
    return whole if taken else None  # type: ignore[return-value]
