"""Which directions of a part's input say most of its output: where a layer of few features should begin.

N examples, I inputs, O outputs, K directions, M the smaller of N and I
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thesean.errors import NumericalError

# Relative to the mean variance of the inputs: there are often more of them than examples.
_RIDGE = 1e-2

# A matrix of so many rows takes a few seconds. Where there are more examples and more inputs, examples are thinned.
_LARGEST = 2048


def directions(
    examples: Sequence[tuple[torch.Tensor, torch.Tensor]], count: int, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first directions of the best linear map of low rank, y = U V' W x with W by ridge regression and V the first
    eigenvectors of the spread of W x (reduced-rank regression: Izenman 1975): rows of V' W, of unit variance over the
    examples, and the constants that centre them. weight_KI and bias_K, in double; K is `count` or as many as there are.

    `examples` are pairs (x_NI, y_NO) of batches. Raises NumericalError where they are not finite.
    """
    x_NI, y_NO = (torch.cat([pair[side] for pair in examples]) for side in (0, 1))
    if x_NI.shape[1] > _LARGEST:
        every = -(-len(x_NI) // _LARGEST)
        x_NI, y_NO = x_NI[::every], y_NO[::every]
    x_NI, y_NO = x_NI.double(), y_NO.double()
    if not bool(x_NI.isfinite().all() and y_NO.isfinite().all()):
        raise NumericalError(f"{where}: can't choose features, activations are not finite. Look for NaN in the data.")
    mean_I = x_NI.mean(0)
    x_NI, y_NO = x_NI - mean_I, y_NO - y_NO.mean(0)
    root_MO, weight_IO = _ridge(x_NI, y_NO)
    values_K, vectors_OK = _first(root_MO, count)
    weight_KI = (weight_IO @ vectors_OK).T / (values_K / len(x_NI)).sqrt().unsqueeze(1)
    return weight_KI, -weight_KI @ mean_I


def _ridge(x_NI: torch.Tensor, y_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A root of the spread of W x, M rows whose squares add up to it, and W: in whichever of both forms of the
    regression has the smaller matrix to solve.
    """
    penalty = _RIDGE * x_NI.square().sum() / x_NI.shape[1] + torch.finfo(x_NI.dtype).tiny
    if len(x_NI) <= x_NI.shape[1]:
        gram_NN = x_NI @ x_NI.T
        gram_NN.diagonal().add_(penalty)
        weight_IO = x_NI.T @ torch.linalg.solve(gram_NN, y_NO)
        return x_NI @ weight_IO, weight_IO
    spread_II, unit_II = x_NI.T @ x_NI, torch.eye(x_NI.shape[1]).to(x_NI)
    weight_IO = torch.linalg.solve(spread_II + penalty * unit_II, x_NI.T @ y_NO)
    return torch.linalg.cholesky(spread_II + 1e-9 * penalty * unit_II).T @ weight_IO, weight_IO


def _first(root_MO: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest first: the squared singular values and right singular vectors that are no rounding error."""
    wide = len(root_MO) < root_MO.shape[1]
    values_M, vectors_MM = torch.linalg.eigh(root_MO @ root_MO.T if wide else root_MO.T @ root_MO)
    values_M, vectors_MM = values_M.flip(0)[:count], vectors_MM.flip(1)[:, :count]
    kept = values_M > 1e-10 * values_M[0]
    values_K, vectors_MK = values_M[kept], vectors_MM[:, kept]
    return values_K, root_MO.T @ vectors_MK / values_K.sqrt() if wide else vectors_MK
