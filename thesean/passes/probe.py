"""Does a region mix tokens, and does it look ahead? Perturb token t and see which outputs move.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thesean.passes.graph import evaluate
from thesean.passes.regions import Region
from thesean.targets.base import Mixing

# Of the output's largest change: rounding moves other tokens by 1e-7, mixing by 1e-3 and more.
_MOVED = 1e-5


def probe_mixing(region: Region, values: dict[fx.Node, Any]) -> Mixing:
    """ "none" (token-wise), "causal", or "bidirectional"; `values` are recorded on inputs of at least 3 tokens.

    Feature maps and vectors, which have no token dimension to probe, count as "bidirectional" and "none".
    """
    x, y = values[region.entry], values[region.exit]
    if x.ndim == 2 or y.ndim == 2:
        return "none"
    if x.ndim != 3 or y.ndim != 3 or x.shape[1] != y.shape[1]:
        return "bidirectional"
    length = x.shape[1]
    generator = torch.Generator().manual_seed(0)
    mixes = looks_ahead = False
    for t in sorted({0, length // 2, length - 1}):
        moved_x = x.clone()
        noise = torch.randn(x[:, t].shape, generator=generator).to(x)
        moved_x[:, t] += noise * x.std().clamp_min(1e-3)
        change_T = (evaluate(region.nodes, values, {region.entry: moved_x}, region.exit) - y).abs().amax((0, 2))
        moved = change_T > _MOVED * change_T.max()
        mixes |= bool(moved[:t].any() or moved[t + 1 :].any())
        looks_ahead |= bool(moved[:t].any())
    if not mixes:
        return "none"
    return "bidirectional" if looks_ahead else "causal"
