"""Is an attention nothing but its projections and a softmax? Compute it from them and compare.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.functional import linear

from thesean.passes.graph import evaluate
from thesean.passes.regions import Region
from thesean.targets.base import AttentionFacts
from thesean.targets.narrow_heads import mixed_values

# Of the output's largest value: two orders of summation differ by 1e-6, a rotary embedding by 1e-1.
_EXACT = 1e-4


@torch.no_grad()
def is_plain_attention(region: Region, values: dict[fx.Node, Any], facts: AttentionFacts) -> bool:
    """The region computes output(softmax(q k' scale + causal mask or none) v) on random input, within rounding.

    A rotary embedding, a relative bias, a soft cap or a normalised key is seen; a window or a distance that only tells
    past the recorded length is not, nor are masks of the guide's inputs, which recordings leave open.
    """
    template = values[region.entry]
    generator = torch.Generator().manual_seed(2)
    x_BTD = torch.randn(template.shape, generator=generator).to(template) * template.std().clamp_min(1e-3)
    want_BTD = evaluate(region.nodes, values, {region.entry: x_BTD}, region.exit)
    for causal in (True, False):
        got_BTD = linear(mixed_values(facts, x_BTD, causal), *facts.output)
        if got_BTD.shape == want_BTD.shape and (got_BTD - want_BTD).abs().max() <= _EXACT * want_BTD.abs().max():
            return True
    return False
