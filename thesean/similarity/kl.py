"""Kullback-Leibler divergence of the distributions that two sets of logits stand for.

N examples, V classes
"""

from __future__ import annotations

import torch

from thesean.errors import DataError
from thesean.kernels.shared.precision import accumulator
from thesean.similarity.shared.measure import Measure

_SERIES_BELOW = 0.03  # where e^r - 1 - r would lose four of float32's seven digits


def divergence(p_NV: torch.Tensor, q_NV: torch.Tensor, r_NV: torch.Tensor) -> torch.Tensor:
    """Mean over rows of sum p (e^r - 1 - r), r = log(q / p): KL(p | q), as a sum of terms none of which is below 0.

    The usual sum p (log p - log q) cancels as q comes near p. Here an error e of a row's normaliser enters as e^2.
    """
    small_NV = r_NV.abs() < _SERIES_BELOW
    near_NV = torch.where(small_NV, r_NV, 0.0)
    series_NV = near_NV.square() / 2 * (1 + near_NV / 3 * (1 + near_NV / 4 * (1 + near_NV / 5)))
    # p e^r = q, which cannot overflow where e^r does
    terms_NV = torch.where(small_NV, p_NV * series_NV, q_NV - p_NV - p_NV * r_NV)
    return terms_NV.sum(1, dtype=accumulator(p_NV.device)).mean()


def check_temperature(name: str, temperature: float) -> None:
    if not temperature > 0:
        raise DataError(f"{name}: temperature: expected a number above 0, found {temperature}.")


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
