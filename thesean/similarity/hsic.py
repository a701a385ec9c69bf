"""The debiased HSIC as an inner product, so that many layers compare in one matrix product.

With the Gram K of centred features, d its diagonal and t the sum of that,

    U_ij = K_ij + (d_i + d_j) / (n-2) - t / ((n-1)(n-2)) for i != j, 0 for i = j      (Székely and Rizzo 2014)
    debiased HSIC of x and y = <U(x), U(y)> / (n (n-3))                               (Song et al. 2012, eq. 5)

N examples, P width
"""

from __future__ import annotations

import torch

from thesean.kernels.precision import centred, full_precision, widen


@torch.no_grad()
def u_centred(x_NP: torch.Tensor) -> torch.Tensor:
    """U, in float32 or float64. x_NP, N >= 4 -> (N, N)."""
    n = x_NP.shape[0]
    with full_precision(x_NP.device):
        x_NP = centred(*widen(x_NP))
        u_NN = x_NP @ x_NP.mT
    # the features' means being 0, so are the Gram's: what is left of a row without its diagonal is -d
    share_N = u_NN.diagonal() / (n - 2)
    share_N = share_N - share_N.sum() / (2 * (n - 1))
    return u_NN.add_(share_N).add_(share_N.unsqueeze(1)).fill_diagonal_(0)
