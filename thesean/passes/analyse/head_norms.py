"""Read the norm of queries or keys off a graph, as numbers: of each head's features or of all heads' together, about
their mean or about zero, with a weight for all heads or one for each.

B batch, T time, G heads of the source, C width of a head
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from thesean.passes.graph.record import evaluate_all
from thesean.targets.shared.facts import Affine
from thesean.targets.shared.head_norm import HeadNorm

# Of the largest entry: fp32 against another order of sums differs by 1e-6.
_EXACT = 1e-4


class Found(NamedTuple):
    """`norm` is taken of the source less its mean where it is `centred`."""

    norm: HeadNorm
    node: fx.Node
    centred: bool

    def centre(self, affine: Affine, width: int) -> Affine:
        """The map to the source with that mean taken off, which is linear."""
        if not self.centred:
            return affine
        group = len(affine.bias_O) if self.norm.whole else width
        weight, bias = (rows.unflatten(0, (-1, group)) for rows in affine)
        return Affine(*((rows - rows.mean(1, keepdim=True)).flatten(0, 1) for rows in (weight, bias)))


def heads_of(value: Any, batch: int, time: int, width: int) -> torch.Tensor | None:
    """(B, T, G C), (B, T, G, C) or (B, G, T, C) as (B, T, G, C); None for anything else."""
    if not isinstance(value, torch.Tensor) or value.ndim not in (3, 4) or value.shape[0] != batch:
        return None
    at = [d for d in range(1, value.ndim - 1) if value.shape[d] == time]
    if len(at) != 1 or value.shape[-1] % width or (value.ndim == 4 and value.shape[-1] != width):
        return None
    return value.movedim(at[0], 1).reshape(batch, time, -1, width)


@torch.no_grad()
def find_norm(
    values: dict[fx.Node, Any], run: Sequence[fx.Node], source: fx.Node, width: int, time: int
) -> Found | None:
    """The last node of `run` at which the source's heads are divided by their root mean square, times a weight, plus a
    bias; None where there is none.
    """
    template = values[source]
    batch = template.shape[0]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(template.shape, generator=generator).to(template)
    x_BTGC = heads_of(x, batch, time, width)
    if x_BTGC is None:
        return None
    # so large that eps counts for nothing, so small that it is nearly all, as it comes, and nothing
    runs = [evaluate_all(run, values, {source: scale * x}) for scale in (1e3, 1e-3, 1.0, 0.0)]
    found: Found | None = None
    for node in run:
        if node is source or any(not isinstance(r.get(node), torch.Tensor) for r in runs):
            continue
        read = [heads_of(r[node], batch, time, width) for r in runs]
        if any(y is None or y.shape != x_BTGC.shape for y in read):
            continue
        for whole, centred in itertools.product((False, True), (False, True)):
            norm = _norm(x_BTGC, read, whole, centred)  # type: ignore[arg-type]
            if norm is not None:
                found = Found(norm, node, centred)
                break
    return found


def _norm(x_BTGC: torch.Tensor, read: list[torch.Tensor], whole: bool, centred: bool) -> HeadNorm | None:
    large, small, usual, nothing = (y.double() for y in read)
    dims = (-2, -1) if whole else (-1,)
    x = x_BTGC.double()
    x = x - x.mean(dims, keepdim=True) if centred else x
    rms = x.square().mean(dims, keepdim=True).sqrt()
    bias_GC = nothing[0, 0].nan_to_num()  # 0 / 0 where there is no eps
    weight_GC = ((large - bias_GC) * rms / x).flatten(0, 1).median(0).values
    ratio = x * weight_GC / (small - bias_GC)  # sqrt(1e-6 mean x^2 + eps) * 1e3
    eps = float(((ratio * 1e-3).square() - 1e-6 * rms.square()).nanmedian())
    if not eps < 1:
        return None
    weight, bias = (t.to(x_BTGC) for t in (weight_GC, bias_GC))
    if not whole and _is_one(weight) and _is_one(bias):
        weight, bias = weight[0], bias[0]
    norm = HeadNorm(weight, max(0.0, eps), bias if bool(bias.abs().max() > _EXACT * usual.abs().max()) else None, whole)
    return norm if (norm.of(x.to(x_BTGC)) - usual).abs().max() <= _EXACT * usual.abs().max() else None


def _is_one(rows_GC: torch.Tensor) -> bool:
    """All heads have the same."""
    return bool((rows_GC - rows_GC[0]).abs().max() <= _EXACT * rows_GC.abs().max())
