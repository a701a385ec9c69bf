"""PWCCA: canonical correlations, weighted by how much of x each direction accounts for. Evaluation only.

N examples, P width of x, Q width of y, K directions
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import accumulator, centred
from thesean.similarity.shared.cca import subspace
from thesean.similarity.shared.measure import Measure


def pwcca(x_NP: torch.Tensor, y_NQ: torch.Tensor) -> torch.Tensor:
    """PWCCA (Morcos et al. 2018, eq. 6): sum of a_k rho_k / sum of a_k, a_k = sum_j |<h_k, x_j>|.

    h_k are x's canonical variates, x_j its features. x_NP, y_NQ -> scalar in [0, 1]. Not symmetric; blind to any
    invertible linear map of y, but not to a rotation of x, whose features are weighed one by one. Raises DataError for
    too few examples.
    """
    x_NK, y_NL = subspace("pwcca", "x", x_NP), subspace("pwcca", "y", y_NQ)
    rotation_KM, rho_M, _ = torch.linalg.svd(x_NK.mT @ y_NL, full_matrices=False)
    variates_NM = x_NK @ rotation_KM
    weight_M = (variates_NM.mT @ centred(x_NP.to(accumulator(x_NP.device)))).abs().sum(1)
    return (weight_M * rho_M.clamp_max(1)).sum() / weight_M.sum()


MEASURE = Measure(
    name="pwcca",
    summary="canonical correlations weighted by their share of x (Morcos et al. 2018); not symmetric; evaluation only",
    value=pwcca,
    min_examples=4,
    must_vary=("x", "y"),
    blind_to=frozenset({"scale", "shift"}),  # and to a rotation of y, but not of x
)
