"""Steps as they are read, some of a value's channels as a value of their own, and channels in another order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.record import evaluate
from thesean.targets.shared.channels import (
    Activate,
    Average,
    Convolution,
    Lay,
    Pad,
    Pick,
    Pool,
    Resize,
    Scale,
    Slope,
    Step,
    Weights,
)


class ReadSteps:
    """Steps so far, those that `some_of` leaves unread too, and, by step, their weights; by value `dims`, how many
    dimensions a place is told by.
    """

    def __init__(self, dims: int) -> None:
        self.steps: list[Step] = []
        self.weights: dict[int, Weights] = {}
        self.dims = [dims]

    def add(self, step: Step, weights: Weights | None = None) -> int:
        """The number of its value."""
        if weights is not None:
            self.weights[len(self.steps)] = weights
        self.steps.append(step)
        self.dims.append(max(1, len(step.size)) if isinstance(step, Lay) else self.dims[step.of])
        return len(self.steps)

    def some_of(self, value: int, start: int, count: int) -> int:
        """The value of so many channels in a row: made anew from those rows of the convolution that makes them, picked
        out where none does.
        """
        step = self.steps[value - 1] if value else None
        own = self.weights.get(value - 1)
        rows = slice(start, start + count)
        some = None if own is None else Weights(own.weight[rows], None if own.bias is None else own.bias[rows])
        if isinstance(step, Convolution) and step.mixes:
            return self.add(step.model_copy(update={"channels_out": count}), some)
        by_channel = isinstance(step, Scale) or (isinstance(step, Slope) and step.channels > 1)
        fewer: dict[str, int] = {"channels": count} if by_channel else {}
        if isinstance(step, Convolution) and step.block == 1:
            fewer = {"channels_in": count, "channels_out": count, "groups": count}
        elif not isinstance(step, (Activate, Average, Lay, Pad, Pool, Resize, Scale, Slope)):  # or the part's input
            return self.add(Pick(of=value, places=tuple(range(start, start + count))))
        of = self.some_of(step.of, start, count)
        return self.add(step.model_copy(update={"of": of} | fewer), some if fewer else own)


# what lays numbers out in another way
_RELAYING = {"view", "reshape", "_unsafe_view", "transpose", "permute", "flatten", "unflatten", "clone", "contiguous"}


def reordered(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[list[fx.Node], tuple[int, ...]] | None:
    """The nodes from one on, each read by the next alone, that lay a map out anew and end in the same map with its
    channels in another order: channel shuffles. None where they don't.
    """
    if not _relays(node):
        return None
    of = node.all_input_nodes[0]
    x = values[of]
    by_channel = (1, -1, *[1] * (x.ndim - 2))
    places = torch.arange(x.shape[1]).view(by_channel).expand(x.shape)
    chain = [node]
    while True:
        end = chain[-1]
        if len(chain) > 1 and values[end].shape == x.shape:
            found = evaluate(chain, values, {of: places}, end)  # type: ignore[arg-type]
            places_C = found[0].reshape(x.shape[1], -1)[:, 0]
            if bool((found == places_C.view(by_channel)).all()):
                return chain, tuple(places_C.tolist())
        following = next(iter(end.users), None)
        if following is None or len(end.users) > 1 or not _relays(following):
            return None
        chain.append(following)


def _relays(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _RELAYING
