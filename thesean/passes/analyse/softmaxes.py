"""How a softmax is written."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_RELAYED = (aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.to.dtype, aten.type_as.default)
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


def sunk_after(mixed: fx.Node, softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the product, s) where weights @ v is multiplied with sigmoid(logsumexp(x) - s), x being what the softmax reads:
    as if each row had one more key, of score s, whose value is zero.
    """
    for node in (user for user in mixed.users if user.target is aten.mul.Tensor):
        share = next((a for a in node.all_input_nodes if a is not mixed), None)
        while share is not None and share.target in _RELAYED:
            share = share.all_input_nodes[0]
        if share is None or share.target is not aten.sigmoid.default:
            continue
        apart = share.args[0]
        while isinstance(apart, fx.Node) and apart.target in _RELAYED:
            apart = apart.args[0]
        if not isinstance(apart, fx.Node) or apart.target is not aten.sub.Tensor:
            continue
        total, sink = apart.args
        if isinstance(total, fx.Node) and total.target is aten.logsumexp.default and isinstance(sink, fx.Node):
            read = total.args[0]
            if isinstance(read, fx.Node) and read is softmax.args[0]:
                return node, sink
    return None
