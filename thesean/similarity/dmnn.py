"""D-MNN, a differentiable mutual nearest-neighbour similarity; formula, limits and gradient are with its kernel.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

import torch

from thesean.kernels import dmnn as kernel
from thesean.kernels.shared.dispatch import Backend
from thesean.similarity.kl import check_temperature
from thesean.similarity.shared.measure import Measure


def dmnn(x_NP: torch.Tensor, y_NQ: torch.Tensor, temperature: float = 0.1, backend: Backend = "auto") -> torch.Tensor:
    """Agreement of the soft mutual neighbours. x_NP, y_NQ -> scalar in [0, 1]. Blind to rotation, scale and shift."""
    check_temperature("dmnn", temperature)
    return kernel.dmnn(x_NP, y_NQ, temperature=temperature, backend=backend)


def dmnn_distance(
    x_NP: torch.Tensor, y_NQ: torch.Tensor, temperature: float = 0.1, backend: Backend = "auto"
) -> torch.Tensor:
    """1 - D-MNN as half the squared distance of the normalised mutual neighbourhoods, without cancellation near 0."""
    check_temperature("dmnn", temperature)
    return kernel.dmnn_distance(x_NP, y_NQ, temperature=temperature, backend=backend)


MEASURE = Measure(
    name="dmnn",
    summary="agreement of soft mutual nearest neighbours, with a temperature; our definition of D-MNN",
    value=dmnn,
    loss=dmnn_distance,
    min_examples=4,
    must_vary=("x", "y"),
)
