"""Mean squared error: the distance that a drop-in replacement has to bring to zero.

N examples, P width
"""

from __future__ import annotations

import torch

from thesean.similarity.shared.measure import Measure


def mse(x_NP: torch.Tensor, y_NP: torch.Tensor) -> torch.Tensor:
    """Mean of (x - y)^2 over all entries. x_NP, y_NP -> scalar >= 0, 0 when equal."""
    return (x_NP - y_NP).square().mean()


MEASURE = Measure(
    name="mse",
    summary="mean squared error, in the squared units of the activations",
    value=mse,
    loss=mse,
    same_width=True,
    additive=True,
    higher_is_better=False,
)
