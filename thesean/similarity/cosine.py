"""Mean cosine of the angle between each example's activations.

N examples, P width
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from thesean.similarity.shared.measure import Measure


def cosine(x_NP: torch.Tensor, y_NP: torch.Tensor) -> torch.Tensor:
    """Mean over examples of x.y / (|x| |y|). x_NP, y_NP -> scalar in [-1, 1]; an example of zeros counts as 0."""
    return (normalize(x_NP, dim=1) * normalize(y_NP, dim=1)).sum(1).mean()


def cosine_distance(x_NP: torch.Tensor, y_NP: torch.Tensor) -> torch.Tensor:
    """Half the mean squared distance of the unit vectors: 1 - cosine, without its cancellation near 0."""
    return (normalize(x_NP, dim=1) - normalize(y_NP, dim=1)).square().sum(1).mean() / 2


MEASURE = Measure(
    name="cosine",
    summary="mean cosine per example; sees rotation, not the length of the vectors",
    value=cosine,
    loss=cosine_distance,
    same_width=True,
    blind_to=frozenset({"scale"}),
    additive=True,
)
