"""Jensen-Shannon divergence of the distributions that two sets of logits stand for: symmetric and bounded.

N examples, V classes
"""

from __future__ import annotations

import torch

from thesean.similarity.shared.measure import Measure
from thesean.similarity.shared.softmax import check_temperature, divergence


def js(x_NV: torch.Tensor, y_NV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean of KL(p | m) / 2 + KL(q | m) / 2, m = (p + q) / 2 (Lin 1991), in nats. Scalar in [0, log 2]."""
    check_temperature("js", temperature)
    log_p_NV, log_q_NV = (y_NV / temperature).log_softmax(1), (x_NV / temperature).log_softmax(1)
    apart_NV = log_q_NV - log_p_NV
    # log m - log p = log((1 + e^d) / 2), exactly 0 at d = 0, and without overflow on either side
    half_NV = (torch.expm1(-apart_NV.abs()) / 2).log1p()
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    to_p = divergence(p_NV, (p_NV + q_NV) / 2, apart_NV.relu() + half_NV)
    to_q = divergence(q_NV, (p_NV + q_NV) / 2, (-apart_NV).relu() + half_NV)
    return (to_p + to_q) / 2


MEASURE = Measure(
    name="js",
    summary="Jensen-Shannon divergence of two sets of logits: symmetric, at most log 2 nats",
    value=js,
    loss=js,
    same_width=True,
    higher_is_better=False,
    additive=True,
)
