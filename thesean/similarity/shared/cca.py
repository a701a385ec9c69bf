"""Canonical correlation, as SVCCA and PWCCA use it.

N examples, P width, K directions kept
"""

from __future__ import annotations

import torch

from thesean.errors import DataError
from thesean.kernels.shared.precision import accumulator, centred


def subspace(name: str, side: str, x_NP: torch.Tensor, variance: float = 1.0) -> torch.Tensor:
    """An orthonormal basis of the directions that hold `variance` of the features' variance. x_NP -> (N, K).

    In float64. Raises DataError when the directions fill all N - 1 dimensions there are: then every correlation is 1,
    whatever the other side.
    """
    eps = torch.finfo(x_NP.dtype).eps
    wide_NP = x_NP.to(accumulator(x_NP.device))
    u_NK, values_K, _ = torch.linalg.svd(centred(wide_NP), full_matrices=False)
    # directions below the rounding of the features as they came are noise
    rank = int((values_K > eps * max(x_NP.shape) * values_K[0]).sum())
    if variance < 1:
        shares_K = values_K.square().cumsum(0) / values_K.square().sum()
        rank = min(rank, int((shares_K < variance).sum()) + 1)
    if rank >= x_NP.shape[0] - 1:
        raise DataError(
            f"{name}: {side} has {rank} directions and {x_NP.shape[0]} examples, so all correlations are 1. "
            "Use more examples than features, or measure='svcca' with a lower variance=."
        )
    return u_NK[:, :rank]


def check_share(name: str, variance: float) -> None:
    if not 0 < variance <= 1:
        raise DataError(f"{name}: expected 0 < variance <= 1, found {variance}.")
