"""Which directions of a part's input say most of its output: where a layer of few features should begin.

N examples, I inputs, O outputs, K directions, M of them in view
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thesean.errors import NumericalError

# Relative to the mean variance of the inputs: there are often more of them than examples.
_RIDGE = 1e-2

# A matrix of so many rows takes a second. Where there are more examples and more inputs, examples are thinned.
_LARGEST = 2048

# So few examples a direction say more of themselves than of the part.
_EXAMPLES = 8

# Of a direction's deviation: whoever scales up what dies out in the guide has no bound for what a hybrid makes of it.
_LEAST = 1e-4

# Rounds of the search for the first directions, and how many more of them it keeps in view
_ROUNDS, _MORE = 4, 16


def directions(
    examples: Sequence[tuple[torch.Tensor, torch.Tensor]], count: int, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first directions of the best linear map of low rank, V V' W x with W by ridge regression and V the first
    right singular vectors of what it fits, H Y (reduced-rank regression: Izenman 1975): rows of V' W, of unit variance
    over the examples, and the constants that centre them. weight_KI and bias_K, in double; K is `count`, or as many as
    there are, or as the examples can tell. The singular vectors are found by subspace iteration (Halko et al. 2011,
    algorithm 4.4).

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
    regression = _Ridge(x_NI)
    generator = torch.Generator().manual_seed(0)
    seen = min(count + _MORE, *x_NI.shape, y_NO.shape[1])
    basis_OM = torch.randn(y_NO.shape[1], seen, dtype=torch.float64, generator=generator).to(x_NI)
    for _ in range(_ROUNDS):
        basis_NM = torch.linalg.qr(x_NI @ regression(y_NO @ basis_OM)).Q
        fitted_OM = y_NO.T @ (x_NI @ regression(basis_NM))
        basis_OM = torch.linalg.qr(fitted_OM).Q
    vectors_OM, values_M, _ = torch.linalg.svd(fitted_OM, full_matrices=False)
    kept = (values_M > 1e-6 * values_M[0]).nonzero()[: min(count, len(x_NI) // _EXAMPLES), 0]
    weight_IK = regression(y_NO @ vectors_OM[:, kept])
    weight_KI = (weight_IK / (x_NI @ weight_IK).square().mean(0).sqrt().clamp_min(_LEAST)).T
    return weight_KI, -weight_KI @ mean_I


class _Ridge:
    """z_NM -> its ridge coefficients on x, (I, M), by whichever form has the smaller matrix."""

    def __init__(self, x_NI: torch.Tensor) -> None:
        self.x_NI, self.dual = x_NI, len(x_NI) <= x_NI.shape[1]
        matrix = x_NI @ x_NI.T if self.dual else x_NI.T @ x_NI
        penalty = _RIDGE * matrix.diagonal().sum() / x_NI.shape[1]
        matrix.diagonal().add_(penalty.clamp_min(1e-30))
        self.root = torch.linalg.cholesky(matrix)

    def __call__(self, z_NM: torch.Tensor) -> torch.Tensor:
        if self.dual:
            return self.x_NI.T @ torch.cholesky_solve(z_NM, self.root)
        return torch.cholesky_solve(self.x_NI.T @ z_NM, self.root)
