"""Kullback-Leibler divergence of the distributions that two sets of logits stand for.

N examples, V classes
"""

from __future__ import annotations

import torch

from thesean.similarity.shared.measure import Measure
from thesean.similarity.shared.softmax import check_temperature, divergence


def kl(x_NV: torch.Tensor, y_NV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean of KL(softmax(y / T) | softmax(x / T)), in nats: y is the guide, x the student. Scalar >= 0.

    No factor T^2 (Hinton et al. 2015): multiply by it to keep gradients of one size over temperatures.
    """
    check_temperature("kl", temperature)
    log_q_NV, log_p_NV = (x_NV / temperature).log_softmax(1), (y_NV / temperature).log_softmax(1)
    return divergence(log_p_NV.exp(), log_q_NV.exp(), log_q_NV - log_p_NV)


MEASURE = Measure(
    name="kl",
    summary="KL divergence of the student's distribution x from the guide's y, for logits, in nats",
    value=kl,
    loss=kl,
    same_width=True,
    higher_is_better=False,
    additive=True,
)
