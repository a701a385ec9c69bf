"""SVCCA: the mean canonical correlation of the directions that carry the variance. Evaluation only.

N examples, P width of x, Q width of y, K and L directions kept
"""

from __future__ import annotations

import torch

from thesean.similarity.shared.cca import check_share, subspace
from thesean.similarity.shared.measure import Measure


def svcca(x_NP: torch.Tensor, y_NQ: torch.Tensor, variance: float = 0.99) -> torch.Tensor:
    """SVCCA (Raghu et al. 2017): mean of the min(K, L) correlations. x_NP, y_NQ -> scalar in [0, 1].

    `variance` is the share that the kept directions hold. Raises DataError for too few examples to tell them apart.
    """
    check_share("svcca", variance)
    x_NK, y_NL = subspace("svcca", "x", x_NP, variance), subspace("svcca", "y", y_NQ, variance)
    return torch.linalg.svdvals(x_NK.mT @ y_NL).clamp_max(1).mean()


MEASURE = Measure(
    name="svcca",
    summary="mean canonical correlation of the directions with 99% of the variance (Raghu et al. 2017); evaluation",
    value=svcca,
    min_examples=4,
    must_vary=("x", "y"),
    blind_to=frozenset({"rotation", "scale", "shift"}),
)
