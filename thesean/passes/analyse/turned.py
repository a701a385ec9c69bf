"""Whether queries and keys are turned by their steps, where how isn't read: of what is known of the attention, nothing
is asked but where its queries and keys are.

B batch, T time, D width, H heads, C width of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.affine_maps import between
from thesean.passes.analyse.regions import Region
from thesean.passes.analyse.scores import find_core
from thesean.passes.graph.record import evaluate
from thesean.targets.shared.facts import AttentionFacts

# Of a head's largest entry: products of equal rows differ by 1e-7 at most, a rotation by its sine.
_SAME = 1e-3


@torch.no_grad()
def turned_unread(region: Region, values: dict[fx.Node, Any], read: AttentionFacts | None) -> bool:
    """Whether one token, at every step alike, is another query or key at the last step than at the one before, and no
    rotation was `read`. What looks back a few steps alone gives the same there.
    """
    if values[region.entry].ndim != 3 or (read is not None and (read.plain or read.rotation is not None)):
        return False
    core = find_core(region, values)
    if core is None:
        return False
    x_BTD = values[region.entry]
    same_BTD = x_BTD[:, :1].expand_as(x_BTD).contiguous()
    for operand in (core.query, core.key):
        run = between(region, [region.entry], operand.node)
        out_BHTC = operand.of(evaluate(run, values, {region.entry: same_BTD}, operand.node))
        if out_BHTC.shape[2] < 2:  # keys of a whole picture pooled into one
            continue
        last_BHC, before_BHC = out_BHTC[:, :, -1], out_BHTC[:, :, -2]
        if (last_BHC - before_BHC).abs().max() > _SAME * last_BHC.abs().max():
            return True
    return False
