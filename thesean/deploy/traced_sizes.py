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

from thesean.deploy.parity import CheckSizes, runnable
from thesean.passes.graph.signature import Signature


def traced_sizes(
    module: fx.GraphModule, signature: Signature, wanted: Sequence[tuple[int, int | None]]
) -> Iterator[dict[str, int]]:
    """Of `wanted` batches and lengths, and then the guide's example's own, those at which the module runs: first those
    at which nothing that grows is 1.
    """
    tried = list(dict.fromkeys(CheckSizes(batch=b, length=n).within(signature) for b, n in wanted))
    sizes = [each.of(signature) for each in tried if runnable(module, signature, each)]
    if (own := _own(module, signature)) is not None and own not in sizes:
        sizes.append(own)
    if not any(not name.startswith("batch") for name in signature.symbols):
        yield from sizes
        return
    shapes = [_shapes(module, signature, each) for each in sizes]
    left = [at for at, found in enumerate(shapes) if any(_outgrows(found, other) for other in shapes)]
    yield from (each for at, each in enumerate(sizes) if at not in left)
    yield from (sizes[at] for at in left)


def of_stream(sizes: dict[str, int], stream: Signature) -> dict[str, int]:
    """Of a stream's dimensions, which may be named otherwise."""
    length = next((n for s, n in sizes.items() if not s.startswith("batch")), 1)
    batch = next((n for s, n in sizes.items() if s.startswith("batch")), 1)
    return {s: sizes.get(s, batch if s.startswith("batch") else length) for s in stream.symbols}


def _own(module: fx.GraphModule, signature: Signature) -> dict[str, int] | None:
    """The example's, where it tells all."""
    known = signature.example_sizes
    sizes = signature.within({s: 2 if s.startswith("batch") else known.get(s, 0) for s in signature.symbols})
    if not all(sizes.values()) or not signature.fits(sizes):
        return None
    try:
        _shapes(module, signature, sizes)
    except (RuntimeError, IndexError):
        return None
    return sizes


@torch.no_grad()
def _shapes(module: fx.GraphModule, signature: Signature, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    """Of all tensors that are computed, in order."""
    found: list[tuple[int, ...]] = []

    class Looking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found.extend(tuple(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
            return value

    inputs = signature.random_inputs(sizes)
    Looking(module).run(*(inputs[str(n.target)] for n in module.graph.find_nodes(op="placeholder")))
    return found


def _outgrows(found: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> bool:
    """Whether a size that is 1 is another elsewhere."""
    sizes = (zip_longest(mine, theirs, fillvalue=0) for mine, theirs in zip(found, other, strict=False))
    return any(mine == 1 < theirs for each in sizes for mine, theirs in each)
