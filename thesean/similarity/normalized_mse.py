"""Squared error in units of the guide's variance: comparable between layers of different scale.

N examples, P width
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import centred
from thesean.similarity.shared.measure import Measure


def normalized_mse(x_NP: torch.Tensor, y_NP: torch.Tensor) -> torch.Tensor:
    """|x - y|^2 / |y - mean y|^2, the mean over examples. x_NP, y_NP -> scalar >= 0; 1 for predicting the mean."""
    return (x_NP - y_NP).square().sum() / centred(y_NP).square().sum()


MEASURE = Measure(
    name="nmse",
    summary="mean squared error over the variance of y: 0 is equal, 1 is no better than y's mean",
    value=normalized_mse,
    loss=normalized_mse,
    min_examples=2,
    same_width=True,
    higher_is_better=False,
    must_vary=("y",),
)
