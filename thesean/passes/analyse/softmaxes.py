"""How a softmax is written."""

from __future__ import annotations

from collections.abc import Container
from operator import getitem
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_RELAYED = (aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.to.dtype, aten.type_as.default)
_LARGEST = (aten.max.dim, aten.amax.default)


def less_its_largest(node: fx.Node) -> fx.Node | None:
    """x, where the node is x - max(x), of which a softmax sees no difference."""
    whole, taken = _arguments(node, (aten.sub.Tensor,))
    (read,) = _arguments(_before(taken, (getitem, aten.detach.default)), _LARGEST, 1)
    return whole if whole is not None and read is whole else None


def sunk_after(mixed: fx.Node, softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the product, s) where weights @ v is multiplied with sigmoid(logsumexp(x) - s), x being what the softmax reads:
    as if each row had one more key, of score s, whose value is zero.
    """
    for node in (user for user in mixed.users if user.target is aten.mul.Tensor):
        share = next((a for a in node.all_input_nodes if a is not mixed), None)
        (apart,) = _arguments(_before(share, _RELAYED), (aten.sigmoid.default,), 1)
        total, sink = _arguments(_before(apart, _RELAYED), (aten.sub.Tensor,))
        (read,) = _arguments(total, (aten.logsumexp.default,), 1)
        if sink is not None and read is not None and read is softmax.args[0]:
            return node, sink
    return None


def _before(node: fx.Node | None, passed: Container[Any]) -> fx.Node | None:
    """The first one, going up, that isn't one of these."""
    while node is not None and node.target in passed:
        (node,) = _arguments(node, (node.target,), 1)
    return node


def _arguments(node: fx.Node | None, targets: Container[Any], count: int = 2) -> list[fx.Node | None]:
    """Its first arguments; None for one that is no node, and for all where the node is none of these operators."""
    if node is None or node.target not in targets:
        return [None] * count
    return [a if isinstance(a, fx.Node) else None for a in node.args[:count]]
