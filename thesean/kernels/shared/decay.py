"""What is left of one step at a later one.

B batch, H heads, C time within a chunk
"""

from __future__ import annotations

import torch


def decay_between(log_decay_BHC: torch.Tensor) -> torch.Tensor:
    """decay_BHCC[t, s] = exp(g_{s+1} + ... + g_t) for s <= t, zero above the diagonal."""
    size = log_decay_BHC.shape[-1]
    keep_CC = torch.ones(size, size, dtype=torch.bool, device=log_decay_BHC.device).tril()
    # Each column sums its own steps. The difference of two cumulative sums would lose the digits of what follows a
    # strong decay, and make nan of a reset (g = -inf).
    steps_BHCC = log_decay_BHC.unsqueeze(-1).expand(*log_decay_BHC.shape, size).masked_fill(~keep_CC.tril(-1), 0.0)
    # masked before exp: above the diagonal 0 * inf would be nan, in the gradient even under a later mask
    return steps_BHCC.cumsum(-2).masked_fill(~keep_CC, -torch.inf).exp()
