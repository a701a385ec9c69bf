"""The debiased HSIC as an inner product, so that many layers compare in one matrix product.

With the Gram K of features, its diagonal set to 0, r the sums of its rows and s that of all,

    U_ij = K_ij - (r_i + r_j) / (n-2) + s / ((n-1)(n-2)) for i != j, 0 for i = j      (Székely and Rizzo 2014)
    debiased HSIC of x and y = <U(x), U(y)> / (n (n-3))                               (Song et al. 2012, eq. 5)

N examples, P width
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import full_precision, widen

_COLUMNS = 512  # of the features that are centred at a time: fresh memory for all of them costs more than the centring
_PANELS = 4  # of a Gram's columns: of each only what is not above the diagonal, 10 blocks of 16


@torch.no_grad()
def u_centred(x_NP: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """U, in float32 or float64, in `out` if given. x_NP, N >= 4 -> (N, N). Zero for features that do not vary."""
    n = x_NP.shape[0]
    (x_NP,) = widen(x_NP)
    u_NN = x_NP.new_empty(n, n) if out is None else out
    with full_precision(x_NP.device):
        _gram(x_NP, u_NN)
    energy = _square(u_NN)
    share_N = u_NN.fill_diagonal_(0).sum(1) / (n - 2)
    share_N = share_N - share_N.sum() / (2 * (n - 1))
    u_NN.sub_(share_N).sub_(share_N.unsqueeze(1)).fill_diagonal_(0)
    if bool(_square(u_NN) <= 4 * torch.finfo(u_NN.dtype).eps * energy):  # nothing but rounding
        u_NN.zero_()
    return u_NN


def _square(x_NN: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(x_NN, x_NN).sum()


def _gram(x_NP: torch.Tensor, out_NN: torch.Tensor) -> None:
    """The Gram of the centred features, of which only the blocks up to the diagonal are multiplied."""
    n, p = x_NP.shape
    rows = max(64, -(-n // _PANELS))
    scratch = x_NP.new_empty(n * min(p, _COLUMNS))
    for number, part_NC in enumerate(x_NP.split(_COLUMNS, 1)):
        centred_NC = scratch[: part_NC.numel()].view(n, -1)
        # An offset would cost the Gram its digits. What is left of the mean here is rounding, and U removes it.
        torch.sub(part_NC, part_NC.mean(0), out=centred_NC)
        for i in range(0, n, rows):
            panel_MR, others_MC, own_RC = out_NN[i:, i : i + rows], centred_NC[i:], centred_NC[i : i + rows]
            if number:
                panel_MR.addmm_(others_MC, own_RC.mT)
            else:
                torch.mm(others_MC, own_RC.mT, out=panel_MR)
    for i in range(rows, n, rows):
        out_NN[:i, i : i + rows] = out_NN[i : i + rows, :i].mT
