"""What crosses from an encoder to a decoder: in which layout, and of which dimensions.

B batch, S steps of the source, H heads, K head width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.analyse.entered import ROWS, Entered, Pair
from thesean.passes.graph.halves import ENCODED
from thesean.passes.graph.resample import kept_example
from thesean.passes.graph.signature import Dim, InputSpec, Signature

aten = torch.ops.aten

_SOURCE = "source"


@dataclass(frozen=True)
class Move:
    """An operator and its arguments past the tensor."""

    operator: Any
    arguments: tuple[Any, ...]

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.operator(value, *self.arguments)
        return moved

    def write(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(self.operator, (node, *self.arguments))


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A node of the encoder that a decoder reads. `spec` is the decoder's input, batch first: `there` makes it of the
    node and `back` the node of it, None where it crosses as it is; `shape` is its own in both runs.
    """

    node: fx.Node
    spec: InputSpec
    shape: tuple[Pair, ...]
    there: Move | None = None
    back: Move | None = None


def crossings(nodes: Sequence[fx.Node], entered: Entered, signature: Signature) -> list[Crossing]:
    """Of these nodes, `encoded_0`... in their order. A length that is no input's is called "source", "source_1"...

    Raises PassRefused for a node that is no tensor with a dimension of the batch.
    """
    prefix = ENCODED
    while any(s.name.startswith(prefix) for s in signature.inputs):
        prefix = f"_{prefix}"
    names: dict[Pair, str] = {ROWS: "batch"}
    found = []
    for count, node in enumerate(nodes):
        if not entered.is_tensor(node):
            raise PassRefused(f"divide encoder: {node.name}: expected a tensor to cross, found another kind of value.")
        there, back, shape = _layout(node.name, entered.shape(node))
        dims: list[Dim] = []
        for pair in shape:
            if pair[0] != pair[1] and pair not in names:
                names[pair] = _SOURCE if len(names) == 1 else f"{_SOURCE}_{len(names) - 1}"
            dims.append(pair[0] if pair[0] == pair[1] else names[pair])
        value = entered.runs[0][node]
        example = kept_example(value if there is None else there(value), 0)
        spec = InputSpec(name=f"{prefix}{count}", dtype=example.dtype, shape=tuple(dims), example=example, held=True)
        found.append(Crossing(node=node, spec=spec, shape=shape, there=there, back=back))
    return found


def _layout(name: str, shape: tuple[Pair, ...]) -> tuple[Move | None, Move | None, tuple[Pair, ...]]:
    """There, back, and the shape in between: the batch in front, and by itself."""
    if shape and shape[0] == ROWS:
        return None, None, shape
    if ROWS in shape:
        dim = shape.index(ROWS)
        swap = Move(aten.transpose.int, (0, dim))
        return swap, swap, tuple(shape[{0: dim, dim: 0}.get(at, at)] for at in range(len(shape)))
    one, other = shape[0] if shape else (0, 0)
    heads = one // ROWS[0]
    if heads and (one, other) == (heads * ROWS[0], heads * ROWS[1]):
        apart, together = Move(aten.unflatten.int, (0, [-1, heads])), Move(aten.flatten.using_ints, (0, 1))
        return apart, together, (ROWS, (heads, heads), *shape[1:])
    told = ", ".join(str(a) if a == b else "?" for a, b in shape)
    raise PassRefused(
        f"divide encoder: {name}: expected what a decoder reads of its source to have a dimension of the batch, found "
        f"({told})."
    )
