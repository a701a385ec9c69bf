"""D-MNN: do the examples have the same soft nearest neighbours in both spaces?

Our definition; that of the work that coined the name is not public. With u_i = x_i - mean, of length one:

    P_ij = softmax over j != i of <u_i, u_j> / temperature, Q_ij likewise from y
    D-MNN = mean over i of b_i,  b_i = sum_j sqrt(P_ij Q_ij)        (Bhattacharyya's coefficient of the two rows)
    1 - b_i = sum_j (sqrt P_ij - sqrt Q_ij)^2 / 2                   (Hellinger's squared distance: the loss)
    d b_i / d <u_i, u_j> = (sqrt(P_ij Q_ij) - b_i P_ij) / (2 temperature)

Limits: as the temperature falls to 0 it counts the examples whose nearest neighbour is the same in both spaces, and
its gradient vanishes but at ties; as it grows every P is uniform, the value 1 and the gradient 0. Between, a neighbour
counts as far as its cosine is within some temperatures of the nearest one's. exp(1 / temperature) should not be far
below N, or distant examples outweigh the neighbours.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from thesean.errors import DataError
from thesean.kernels.dispatch import Backend, choose, load
from thesean.kernels.precision import accumulator, centred, full_precision, widen


def neighbour_logits(x_NP: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """log P. x_NP -> (N, N), -inf on the diagonal. Differentiable. Raises DataError unless temperature > 0."""
    if not temperature > 0:
        raise DataError(f"dmnn: temperature: expected a number above 0, found {temperature}.")
    unit_NP = normalize(centred(x_NP), dim=1)
    logits_NN = (unit_NP @ unit_NP.mT) / temperature
    own_NN = torch.eye(x_NP.shape[0], dtype=torch.bool, device=x_NP.device)
    return logits_NN.masked_fill(own_NN, -torch.inf).log_softmax(1)


def dmnn(
    x_NP: torch.Tensor, y: torch.Tensor, *, temperature: float = 0.1, prepared: bool = False, backend: Backend = "auto"
) -> torch.Tensor:
    """D-MNN. x_NP, and y_NQ or, `prepared`, its `neighbour_logits` -> scalar in [0, 1], 1 for the same neighbours.

    float32, or float64 where an input is. Differentiable in both. Blind to rotation, scale and shift.
    """
    return _run("dmnn", x_NP, y, temperature=temperature, prepared=prepared, backend=backend)


def dmnn_distance(
    x_NP: torch.Tensor, y: torch.Tensor, *, temperature: float = 0.1, prepared: bool = False, backend: Backend = "auto"
) -> torch.Tensor:
    """1 - D-MNN, the loss to train on, without its cancellation near 0."""
    return _run("dmnn_distance", x_NP, y, temperature=temperature, prepared=prepared, backend=backend)


def _run(
    op: str, x_NP: torch.Tensor, y: torch.Tensor, *, temperature: float, prepared: bool, backend: Backend
) -> torch.Tensor:
    if choose(backend, op, x_NP.device) == "triton":
        options: dict[str, Any] = {"temperature": temperature, "prepared": prepared}
        result: torch.Tensor = load(op)(x_NP, y, **options)
        return result
    x_NP, y = widen(x_NP, y)
    with full_precision(x_NP.device):
        p_NN = (neighbour_logits(x_NP, temperature) / 2).exp()
        q_NN = ((y if prepared else neighbour_logits(y, temperature)) / 2).exp()
        rows_NN = p_NN * q_NN if op == "dmnn" else (p_NN - q_NN).square() / 2
        return (rows_NN.sum(1, dtype=accumulator(x_NP.device)).mean()).to(x_NP.dtype)
