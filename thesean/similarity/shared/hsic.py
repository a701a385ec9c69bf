"""The debiased HSIC as an inner product, so that many layers compare in one matrix product.

With the Gram K of features, its diagonal set to 0, r the sums of its rows and s that of all,

    U_ij = K_ij - (r_i + r_j) / (n-2) + s / ((n-1)(n-2)) for i != j, 0 for i = j      (Székely and Rizzo 2014)
    debiased HSIC of x and y = <U(x), U(y)> / (n (n-3))                               (Song et al. 2012, eq. 5)

N examples, P width
"""

from __future__ import annotations

import torch

from thesean.kernels.centred_gram import centred_gram
from thesean.kernels.shared.dispatch import Backend


@torch.no_grad()
def u_centred(x_NP: torch.Tensor, out: torch.Tensor | None = None, *, backend: Backend = "auto") -> torch.Tensor:
    """U, in float32 or float64, in `out` if given. x_NP, N >= 4 -> (N, N). Zero for features that do not vary."""
    n = x_NP.shape[0]
    u_NN = centred_gram(x_NP, out, backend=backend)  # what it leaves of the features' mean, U removes
    energy = _square(u_NN)
    share_N = u_NN.fill_diagonal_(0).sum(1) / (n - 2)
    share_N = share_N - share_N.sum() / (2 * (n - 1))
    u_NN.sub_(share_N).sub_(share_N.unsqueeze(1)).fill_diagonal_(0)
    if bool(_square(u_NN) <= 4 * torch.finfo(u_NN.dtype).eps * energy):  # nothing but rounding
        u_NN.zero_()
    return u_NN


def _square(x_NN: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(x_NN, x_NN).sum()
