"""Sequences that say again, at their end, what they said at their beginning.

What a bounded memory loses is seen where a sequence comes back to what it left long ago, and ordinary ones seldom do.
Parts that carry that look idle on them: of SmolLM2-135M's attentions, each alone cut to a window of 124 tokens and the
first four, that of layer 18 costs 0.002 nats on documentation, a tenth of what that of layer 3 does, and 1.1 nats where
400 tokens come again 624 tokens later. Repeated tokens are how heads that copy are found (Olsson et al. 2022, induction
heads), and planted passages those that retrieve (Xiao et al. 2024, DuoAttention).

B batch, T time
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thesean.passes.graph.signature import Signature

Inputs = Mapping[str, torch.Tensor]

# Of a sequence: so much it says twice, at its beginning and at its end.
_TWICE = 0.4


def repeating(inputs: Inputs, others: Inputs, signature: Signature) -> dict[str, torch.Tensor] | None:
    """Inputs whose sequences end as they begin, with a piece of `others` between the two, or where those are of another
    size of their own neighbours; None where none is a sequence of free length. An input that numbers its steps, and one
    of pairs of steps, stays.
    """
    found = dict(inputs)
    for spec in signature.inputs:
        x, other = inputs[spec.name], others[spec.name]
        if spec.held or spec.shape.count("time") != 1:
            continue
        if x.shape != other.shape:
            other = x.roll(1, 0)
        time = spec.shape.index("time")
        twice = int(_TWICE * x.shape[time])
        if twice and not _is_count(x, time):
            between = other.narrow(time, twice, x.shape[time] - 2 * twice)
            found[spec.name] = torch.cat([x.narrow(time, 0, twice), between, x.narrow(time, 0, twice)], time)
    return found if any(value is not inputs[name] for name, value in found.items()) else None


def _is_count(x: torch.Tensor, time: int) -> bool:
    return not x.is_floating_point() and x.dtype != torch.bool and bool((x.diff(dim=time) == 1).all())
