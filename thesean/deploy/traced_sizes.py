"""Sizes to trace a graph with so that what is written holds for all others.

torch takes a size of 1 for a constant, and so it does one that comes of another and is 1 there, as a map of 7 places is
behind a stride of 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean.deploy.parity import CheckSizes
from thesean.passes.graph.signature import Signature

# Steps that tell enough of a network of tokens, whose own length may cost minutes.
_ENOUGH = 64

Shapes = list[tuple[int, ...]]


def traced_sizes(
    module: fx.GraphModule, signature: Signature, wanted: Sequence[tuple[int, int | None]]
) -> Iterator[dict[str, int]]:
    """Of `wanted` batches and lengths, and then the guide's example's own, those at which the module runs: first those
    at which nothing that grows is 1.
    """
    reads_tokens = any(spec.high is not None for spec in signature.inputs)
    found: list[tuple[dict[str, int], Shapes]] = []
    for sizes in _candidates(signature, wanted):
        if found and reads_tokens and max(map(sizes.__getitem__, signature.lengths), default=0) > _ENOUGH:
            continue
        shapes = _shapes(module, signature, sizes)
        if shapes is not None and not signature.lengths:
            yield sizes
        elif shapes is not None:
            found.append((sizes, shapes))
    small = [any(_outgrows(shapes, other) for _, other in found) for _, shapes in found]
    for wanted_small in (False, True):
        yield from (sizes for (sizes, _), is_small in zip(found, small, strict=True) if is_small == wanted_small)


def of_stream(sizes: dict[str, int], stream: Signature) -> dict[str, int]:
    """Of a stream's dimensions, which may be named otherwise."""
    length = next((n for s, n in sizes.items() if not s.startswith("batch")), 1)
    return {s: sizes.get(s, sizes.get("batch", 1) if s.startswith("batch") else length) for s in stream.symbols}


def _candidates(signature: Signature, wanted: Sequence[tuple[int, int | None]]) -> list[dict[str, int]]:
    """Each once, within the signature's bounds; the example's own come last, where it tells all."""
    found = [CheckSizes(batch=b, length=n).within(signature).of(signature) for b, n in wanted]
    own = {s: 2 if s.startswith("batch") else signature.example_sizes.get(s, 0) for s in signature.symbols}
    found += [signature.within(own)] if all(own.values()) else []
    return [sizes for at, sizes in enumerate(found) if sizes not in found[:at] and signature.fits(sizes)]


@torch.no_grad()
def _shapes(module: fx.GraphModule, signature: Signature, sizes: dict[str, int]) -> Shapes | None:
    """Of all tensors that are computed, in order; None where the module doesn't run."""
    found: Shapes = []

    class Looking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found.extend(tuple(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
            return value

    inputs = signature.random_inputs(sizes)
    try:
        Looking(module).run(*(inputs[str(n.target)] for n in module.graph.find_nodes(op="placeholder")))
    except (RuntimeError, IndexError):
        return None
    return found


def _outgrows(found: Shapes, other: Shapes) -> bool:
    """Whether a size that is 1 is another elsewhere."""
    sizes = (zip_longest(mine, theirs, fillvalue=0) for mine, theirs in zip(found, other, strict=False))
    return any(mine == 1 < theirs for each in sizes for mine, theirs in each)
