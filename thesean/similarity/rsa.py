"""Representational similarity analysis: do the two spaces find the same pairs of examples far apart?

    RDM_ij = |x_i - x_j|^2, or 1 - the correlation of x_i and x_j over features     (Kriegeskorte et al. 2008)
    RSA    = the Pearson or Spearman correlation of the two RDMs over the pairs i < j

N examples, P width, K pairs
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import normalize

from thesean.errors import unknown_name
from thesean.kernels.shared.precision import accumulator, centred
from thesean.similarity.shared.distances import above_diagonal, squared_distances
from thesean.similarity.shared.measure import EvaluationOnlyError, Measure
from thesean.similarity.shared.prepared import Prepared, preparer, side

Distance = Literal["sqeuclidean", "correlation"]
Rank = Literal["spearman"]


def unit_rdm(x_NP: torch.Tensor, distance: Distance = "sqeuclidean", rank: Rank | None = None) -> torch.Tensor:
    """The pairs' distances, centred and of length one. x_NP -> (K,), in float64."""
    if rank not in (None, "spearman"):
        raise unknown_name("rank", rank, ("spearman",))
    if rank:  # float32 would turn ties into noise
        x_NP = x_NP.detach().to(accumulator(x_NP.device))
    if distance == "sqeuclidean":
        rdm_K = above_diagonal(squared_distances(x_NP))
    elif distance == "correlation":
        pattern_NP = normalize(centred(x_NP.mT).mT, dim=1)
        # |a - b|^2 / 2 = 1 - <a, b> for unit vectors
        rdm_K = above_diagonal(squared_distances(pattern_NP)) / 2
    else:
        raise unknown_name("distance", distance, ("sqeuclidean", "correlation"))
    if rank:
        rdm_K = _ranks(rdm_K)
    rdm_K = rdm_K - rdm_K.mean()
    return rdm_K / rdm_K.square().sum().sqrt()


def _ranks(x_K: torch.Tensor) -> torch.Tensor:
    """1 for the smallest; equal values share their mean rank. NaN anywhere makes all NaN, as arithmetic would."""
    _, place_K, counts = x_K.unique(return_inverse=True, return_counts=True)
    ranks_K = (counts.cumsum(0) - (counts - 1) / 2).to(x_K.dtype)[place_K]
    return torch.where(x_K.isfinite().all(), ranks_K, torch.nan)


def rsa(
    x_NP: torch.Tensor,
    y: torch.Tensor | Prepared,
    distance: Distance = "sqeuclidean",
    rank: Rank | None = None,
) -> torch.Tensor:
    """Correlation of the RDMs. x_NP, y_NQ -> scalar in [-1, 1]; with `rank="spearman"` evaluation only, no gradient.

    Squared Euclidean distances are blind to rotation, scale and shift; correlation distances to each example's own
    scale and shift, not to rotation. Raises UnknownNameError for another distance or rank.
    """
    return (unit_rdm(x_NP, distance, rank) * side(y, unit_rdm, distance=distance, rank=rank)).sum()


def rsa_distance(
    x_NP: torch.Tensor,
    y: torch.Tensor | Prepared,
    distance: Distance = "sqeuclidean",
    rank: Rank | None = None,
) -> torch.Tensor:
    """1 - RSA as half the squared distance of the normalised RDMs. Raises EvaluationOnlyError for ranks."""
    if rank:
        raise EvaluationOnlyError("rsa: ranks have no gradient. Train with rank=None, report rank='spearman'.")
    return (unit_rdm(x_NP, distance) - side(y, unit_rdm, distance=distance, rank=None)).square().sum() / 2


MEASURE = Measure(
    name="rsa",
    summary="correlation of the pairs' distances in both spaces (Kriegeskorte et al. 2008); rank='spearman' to report",
    value=rsa,
    loss=rsa_distance,
    prepare=preparer(unit_rdm),
    min_examples=4,
    must_vary=("x", "y"),
    blind_to=frozenset({"rotation", "scale", "shift"}),
)
