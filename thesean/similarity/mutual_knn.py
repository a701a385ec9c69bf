"""Mutual k-nearest neighbours, hard: the share of neighbours that two spaces have in common. Evaluation only.

N examples, P width of x, Q width of y, K neighbours
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from thesean.errors import DataError
from thesean.kernels.shared.precision import accumulator, centred
from thesean.similarity.shared.measure import Measure


def mutual_knn(x_NP: torch.Tensor, y_NQ: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """Mean of |neighbours in x and in y| / k (Huh et al. 2024, eq. 11, on centred features by cosine).

    x_NP, y_NQ -> scalar in [0, 1]; unrelated spaces score k / (N - 1). `k` is 10 by default, or half the others where
    there are fewer than 20. Raises DataError unless 1 <= k < N - 1: with k = N - 1 all are neighbours.
    """
    n = x_NP.shape[0]
    k = min(10, (n - 1) // 2) if k is None else k
    if not 1 <= k < n - 1:
        raise DataError(f"mutual-knn: expected 1 <= k < {n - 1} for {n} examples, found k={k}.")
    x_NN, y_NN = _is_neighbour(x_NP, k), _is_neighbour(y_NQ, k)
    return (x_NN & y_NN).sum(dtype=accumulator(x_NP.device)) / (n * k)


def _is_neighbour(x_NP: torch.Tensor, k: int) -> torch.Tensor:
    # in float64: which of two near neighbours is nearer is decided by the last digits
    unit_NP = normalize(centred(x_NP.to(accumulator(x_NP.device))), dim=1)
    cosine_NN = unit_NP @ unit_NP.mT
    nearest_NK = cosine_NN.fill_diagonal_(-torch.inf).topk(k).indices
    return torch.zeros_like(cosine_NN, dtype=torch.bool).scatter_(1, nearest_NK, True)


MEASURE = Measure(
    name="mutual-knn",
    summary="share of the k nearest neighbours in common (Huh et al. 2024); evaluation only",
    value=mutual_knn,
    min_examples=4,
    must_vary=("x", "y"),
    blind_to=frozenset({"rotation", "scale", "shift"}),
)
