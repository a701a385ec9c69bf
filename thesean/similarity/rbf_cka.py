"""CKA with a Gaussian kernel: sees neighbourhoods, where the linear kernel sees directions of large variance.

    k(x_i, x_j) = exp(-|x_i - x_j|^2 / (2 bandwidth^2 m)),   m: the median of |x_i - x_j|^2 over i < j
    CKA = <HKH, HLH> / (|HKH| |HLH|)                         (Kornblith et al. 2019, eqs. 3 and 4)

N examples, P width, K pairs
"""

from __future__ import annotations

import torch

from thesean.similarity.shared.distances import above_diagonal, squared_distances
from thesean.similarity.shared.measure import Measure
from thesean.similarity.shared.prepared import Prepared, preparer, side

_TIED = 1e-6  # of the median: what float32 rounds in a squared distance


def unit_kernel(x_NP: torch.Tensor, bandwidth: float = 1.0) -> torch.Tensor:
    """HKH / |HKH|. x_NP -> (N, N), in float64. The median has its gradient too, so that scale has none."""
    distances_NN = squared_distances(x_NP)
    pairs_K = above_diagonal(distances_NN)
    middle = pairs_K.detach().median()
    # features of half precision lie on a grid and make ties, which rounding would break: all of them have a share in
    # the gradient
    median = pairs_K[(pairs_K - middle).abs() <= _TIED * middle].mean()
    kernel_NN = (distances_NN / (-2 * bandwidth**2 * median)).exp()
    kernel_NN = kernel_NN - kernel_NN.mean(0)
    kernel_NN = kernel_NN - kernel_NN.mean(1, keepdim=True)
    return kernel_NN / kernel_NN.square().sum().sqrt()


def rbf_cka(x_NP: torch.Tensor, y: torch.Tensor | Prepared, bandwidth: float = 1.0) -> torch.Tensor:
    """Gaussian CKA. x_NP, y_NQ -> scalar in [0, 1]. `bandwidth` in units of the median distance, of each side its own.

    Blind to rotation, scale and shift. NaN where more than half of the pairs are equal.
    """
    return (unit_kernel(x_NP, bandwidth) * side(y, unit_kernel, bandwidth=bandwidth)).sum()


def rbf_cka_distance(x_NP: torch.Tensor, y: torch.Tensor | Prepared, bandwidth: float = 1.0) -> torch.Tensor:
    """1 - CKA as half the squared distance of the normalised kernels, without cancellation near 0."""
    return (unit_kernel(x_NP, bandwidth) - side(y, unit_kernel, bandwidth=bandwidth)).square().sum() / 2


MEASURE = Measure(
    name="rbf-cka",
    summary="CKA with a Gaussian kernel of the median bandwidth (Kornblith et al. 2019)",
    value=rbf_cka,
    loss=rbf_cka_distance,
    prepare=preparer(unit_kernel),
    min_examples=4,
    must_vary=("x", "y"),
    blind_to=frozenset({"rotation", "scale", "shift"}),
)
