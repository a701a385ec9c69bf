"""What measures with a softmax share: the check of its temperature, and a divergence that doesn't cancel.

N examples, V classes
"""

from __future__ import annotations

import torch

from thesean.errors import DataError
from thesean.kernels.shared.precision import accumulator

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
