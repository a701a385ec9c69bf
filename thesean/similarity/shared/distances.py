"""Distances between the examples of one side, as the measures of neighbourhoods and of pairs read them.

N examples, P width, K pairs
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import accumulator, centred


def squared_distances(x_NP: torch.Tensor) -> torch.Tensor:
    """|x_i - x_j|^2, exactly 0 on the diagonal. x_NP -> (N, N) in float64; one matrix product, in x's own dtype."""
    x_NP = centred(x_NP)
    gram_NN = (x_NP @ x_NP.mT).to(accumulator(x_NP.device))
    squares_N = gram_NN.diagonal()
    return (squares_N.unsqueeze(1) + squares_N - 2 * gram_NN).clamp_min(0)


def above_diagonal(x_NN: torch.Tensor) -> torch.Tensor:
    """The entries of each pair i < j once. x_NN -> (K,)."""
    rows, columns = torch.triu_indices(x_NN.shape[0], x_NN.shape[1], 1, device=x_NN.device)
    return x_NN[rows, columns]
