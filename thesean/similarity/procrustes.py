"""Orthogonal Procrustes: how far apart two clouds of points stay after the best rotation of one onto the other.

    with X and Y centred and of Frobenius norm one: similarity = |X' Y|_*, the nuclear norm, and
    min over orthogonal Q of |X Q - Y|^2 = 2 (1 - similarity)      (Schönemann 1966; Williams et al. 2021)

With X' Y = A S B', A and B of orthonormal columns, the gradient is that of <XA, YB> at A and B held fixed (they are a
maximum, so they have no share in it): it needs no derivative of a decomposition, and is right at equal singular values.

N examples, P width of x, Q width of y, K <= N, P, Q
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import accumulator, centred
from thesean.similarity.shared.measure import Measure
from thesean.similarity.shared.prepared import Prepared, preparer, side


def unit_features(x_NP: torch.Tensor) -> torch.Tensor:
    """Centred, and of Frobenius norm one."""
    x_NP = centred(x_NP)
    norm = x_NP.to(accumulator(x_NP.device)).square().sum().sqrt()
    return x_NP / norm.to(x_NP.dtype)


@torch.no_grad()
def _alignment(x_NP: torch.Tensor, y_NQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A_PK and B_QK, in float64: from the (P, Q) product, or for few examples in the span of the rows."""
    wide = accumulator(x_NP.device)
    sides, bases = [], []
    for z in (x_NP.detach().to(wide), y_NQ.detach().to(wide)):
        if z.shape[0] < z.shape[1]:
            basis, triangle = torch.linalg.qr(z.mT)
            sides.append(triangle.mT)
            bases.append(basis)
        else:
            sides.append(z)
            bases.append(None)
    a, _, b = torch.linalg.svd(sides[0].mT @ sides[1], full_matrices=False)
    b = b.mT
    return (a if bases[0] is None else bases[0] @ a), (b if bases[1] is None else bases[1] @ b)


def procrustes(x_NP: torch.Tensor, y: torch.Tensor | Prepared) -> torch.Tensor:
    """Nuclear norm of X'Y. x_NP, y_NQ -> scalar in [0, 1], 1 for a rotation, scaling or shift of the other."""
    x_NP, y_NQ = unit_features(x_NP), side(y, unit_features).to(x_NP.dtype)
    a_PK, b_QK = (z.to(x_NP.dtype) for z in _alignment(x_NP, y_NQ))
    return ((x_NP @ a_PK) * (y_NQ @ b_QK)).to(accumulator(x_NP.device)).sum()


def procrustes_distance(x_NP: torch.Tensor, y: torch.Tensor | Prepared) -> torch.Tensor:
    """1 - similarity as half the squared distance after the best rotation, without cancellation near 0."""
    x_NP, y_NQ = unit_features(x_NP), side(y, unit_features).to(x_NP.dtype)
    a_PK, b_QK = (z.to(x_NP.dtype) for z in _alignment(x_NP, y_NQ))
    x_NK, y_NK = x_NP @ a_PK, y_NQ @ b_QK
    # of the wider side, what no rotation of the narrower one reaches
    apart = ((x_NK - y_NK), (x_NP - x_NK @ a_PK.mT), (y_NQ - y_NK @ b_QK.mT))
    return torch.stack([z.to(accumulator(z.device)).square().sum() for z in apart]).sum() / 2


MEASURE = Measure(
    name="procrustes",
    summary="what the best rotation of one space onto the other explains (Schönemann 1966, Williams et al. 2021)",
    value=procrustes,
    loss=procrustes_distance,
    prepare=preparer(unit_features),
    min_examples=2,
    must_vary=("x", "y"),
    blind_to=frozenset({"rotation", "scale", "shift"}),
)
