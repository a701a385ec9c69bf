"""The Gram matrix of centred features, K = X X^T, half of which is multiplied and the rest mirrored.

N examples, P width
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.dispatch import Backend, choose, load
from thesean.kernels.shared.precision import full_precision

_COLUMNS = 512  # of the features that are centred at a time: fresh memory for all of them costs more than the centring
_PANELS = 4  # of a Gram's columns: of each only what is not above the diagonal, 10 blocks of 16


@torch.no_grad()
def centred_gram(x_NP: torch.Tensor, out_NN: torch.Tensor | None = None, *, backend: Backend = "auto") -> torch.Tensor:
    """x_NP -> (N, N), in `out_NN` if given. Without a gradient.

    In `out_NN`'s dtype, else in float32, or float64 where x is. What rounding leaves of the mean adds r_i + r_j, which
    a reader that centres rows and columns removes.
    """
    if out_NN is None:
        n, dtype = x_NP.shape[0], torch.promote_types(x_NP.dtype, torch.float32)
        out_NN = x_NP.new_empty(n, n, dtype=dtype)
    if backend == "auto" and torch.float64 in (x_NP.dtype, out_NN.dtype):
        backend = "torch"  # the kernel computes in float32
    if choose(backend, "centred_gram", x_NP.device) == "triton":
        return out_NN.copy_(load("centred_gram")(x_NP))
    with full_precision(x_NP.device):
        _by_panels(x_NP.to(out_NN.dtype), out_NN)
    return out_NN


def _by_panels(x_NP: torch.Tensor, out_NN: torch.Tensor) -> None:
    n, p = x_NP.shape
    rows = max(64, -(-n // _PANELS))
    scratch = x_NP.new_empty(n * min(p, _COLUMNS))
    for number, part_NC in enumerate(x_NP.split(_COLUMNS, 1)):
        centred_NC = scratch[: part_NC.numel()].view(n, -1)
        # an offset would cost the Gram its digits
        torch.sub(part_NC, part_NC.mean(0), out=centred_NC)
        for i in range(0, n, rows):
            panel_MR, others_MC, own_RC = out_NN[i:, i : i + rows], centred_NC[i:], centred_NC[i : i + rows]
            if number:
                panel_MR.addmm_(others_MC, own_RC.mT)
            else:
                torch.mm(others_MC, own_RC.mT, out=panel_MR)
    for i in range(0, n, rows):
        own_RR = out_NN[i : i + rows, i : i + rows]  # whose halves differ in the last place on some processors
        own_RR.copy_(own_RR.tril() + own_RR.tril(-1).mT)
        out_NN[:i, i : i + rows] = out_NN[i : i + rows, :i].mT
