"""D-MNN, differentiable mutual nearest neighbours: do two sides agree on whose neighbour is whose?

Mutual k-nearest neighbours (Huh et al. 2024) with soft sets. From features centred and of unit length, z:

    s = z z^T / temperature, its diagonal left out      P_ij = softmax_j s_ij       neighbours, softly
    M_ij = P_ij P_ji = exp(2 s_ij - l_i - l_j)          l_i = logsumexp_j s_ij      mutual ones
    dmnn(x, y) = <Mx, My> / (|Mx| |My|)                 in [0, 1], 1 where Mx and My are proportional

Its gradient in one side's s, with G = d dmnn / d Mx = (My/|My| - dmnn Mx/|Mx|) / |Mx| and r_i = sum_j G_ij M_ij:

    W_ij = 4 G_ij M_ij - 2 (r_i P_ij + r_j P_ji)        dz = W z / temperature, one matrix product a side

The limits: at a high temperature every pair is a neighbour and the value is 1 for any two sides; at a low one only each
example's nearest few count and few pairs carry a gradient. Scale, rotation and offset of a side change nothing.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from thesean.kernels.shared.dispatch import Backend, choose, load
from thesean.kernels.shared.precision import accumulator, centred, full_precision, widen

TEMPERATURE = 0.1


def dmnn(
    x_NP: torch.Tensor,
    y: torch.Tensor,
    *,
    temperature: float = TEMPERATURE,
    prepared: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The agreement of soft mutual neighbours. x_NP, and y_NQ or, `prepared`, its `cosines` -> scalar in [0, 1].

    The scalar is float32, or float64 where an input is. Differentiable once, in both sides' features. An example that
    is exactly the mean has no direction and is equally near to all others. Time and memory grow with N squared. Raises
    ValueError when N < 4, the sides differ in N or the temperature isn't positive.
    """
    return _run("dmnn", x_NP, y, temperature, prepared, backend)


def dmnn_distance(
    x_NP: torch.Tensor,
    y: torch.Tensor,
    *,
    temperature: float = TEMPERATURE,
    prepared: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """1 - D-MNN as half the squared distance of the normalised M, the loss to train on: without cancellation."""
    return _run("dmnn_distance", x_NP, y, temperature, prepared, backend)


def cosines(y_NQ: torch.Tensor) -> torch.Tensor:
    """The guide's side, for use at any temperature with many students: y_NQ -> (N, N). No gradient flows into it."""
    z_NQ = directions(y_NQ.detach())
    with full_precision(z_NQ.device):
        return z_NQ @ z_NQ.mT


def directions(x_NP: torch.Tensor) -> torch.Tensor:
    """Features centred and divided by their length, in float32 at least. x_NP -> z_NP, differentiable."""
    centred_NP = centred(*widen(x_NP))
    return normalize(centred_NP, dim=1, eps=torch.finfo(centred_NP.dtype).tiny ** 0.5)


def _run(
    op: str, x_NP: torch.Tensor, y: torch.Tensor, temperature: float, prepared: bool, backend: Backend
) -> torch.Tensor:
    if x_NP.shape[0] < 4 or x_NP.shape[0] != y.shape[0]:
        raise ValueError(f"{op}: expected N >= 4 examples, as many in x as in y, found {x_NP.shape[0]}, {y.shape[0]}.")
    if not temperature > 0:
        raise ValueError(f"{op}: expected a temperature above 0, found {temperature}.")
    if backend == "auto" and torch.float64 in (x_NP.dtype, y.dtype):
        backend = "torch"  # the kernels compute in float32
    result: torch.Tensor
    if choose(backend, "dmnn", x_NP.device) == "triton":
        result = load("dmnn", op)(x_NP, y, temperature=temperature, prepared=prepared)
    else:
        x_NP, y = widen(x_NP, y)
        y_NQ, cosines_y_NN = (None, y.detach()) if prepared else (directions(y), None)
        result = _DMNN.apply(directions(x_NP), y_NQ, cosines_y_NN, temperature, op == "dmnn_distance")
    return result


class _DMNN(torch.autograd.Function):
    """From directions, or in place of y's their cosines, to the value."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NP: torch.Tensor,
        y_NQ: torch.Tensor | None,
        cosines_y_NN: torch.Tensor | None,
        temperature: float,
        distance: bool,
    ) -> torch.Tensor:
        with full_precision(x_NP.device):
            if y_NQ is not None:
                cosines_y_NN = y_NQ @ y_NQ.mT
            assert cosines_y_NN is not None
            logits_x_NN, normaliser_x_N, mutual_x_NN = _neighbours(x_NP @ x_NP.mT, temperature)
            logits_y_NN, normaliser_y_N, mutual_y_NN = _neighbours(cosines_y_NN, temperature)
        x_scale = _row_dots(mutual_x_NN, mutual_x_NN).sum().rsqrt()
        y_scale = _row_dots(mutual_y_NN, mutual_y_NN).sum().rsqrt()
        if distance:
            apart_NN = mutual_x_NN * x_scale - mutual_y_NN * y_scale
            value = _row_dots(apart_NN, apart_NN).sum() / 2
        else:
            value = _row_dots(mutual_x_NN, mutual_y_NN).sum() * x_scale * y_scale
        ctx.save_for_backward(
            *(x_NP, logits_x_NN, normaliser_x_N, mutual_x_NN, x_scale),
            *(y_NQ, logits_y_NN, normaliser_y_N, mutual_y_NN, y_scale, value),
        )
        ctx.temperature, ctx.distance = temperature, distance
        return value.to(x_NP.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *sides, value = ctx.saved_tensors
        x, y = sides[:5], sides[5:]
        agreement, grad = (1 - value, -grad) if ctx.distance else (value, grad)
        grads: list[torch.Tensor | None] = [None, None]
        with full_precision(grad.device):
            for i, (own, other) in enumerate(((x, y), (y, x))):
                if ctx.needs_input_grad[i]:
                    grads[i] = (_weight(own, other, agreement) @ own[0]).mul_(grad / ctx.temperature)
        return (*grads, None, None, None)


def _neighbours(cosines_NN: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits s_NN, their normalisers l_N and the mutual neighbours M_NN."""
    logits_NN = (cosines_NN / temperature).fill_diagonal_(-torch.inf)
    normaliser_N = logits_NN.logsumexp(1)
    mutual_NN = (2 * logits_NN).sub_(normaliser_N.unsqueeze(1)).sub_(normaliser_N).exp_()
    return logits_NN, normaliser_N, mutual_NN


def _row_dots(a_NN: torch.Tensor, b_NN: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a_NN, b_NN).to(accumulator(a_NN.device))


def _weight(own: list[torch.Tensor], other: list[torch.Tensor], agreement: torch.Tensor) -> torch.Tensor:
    """W_NN of the module's equations. own, other: z, logits, normalisers, M and 1 / |M|."""
    _, logits_NN, normaliser_N, mutual_NN, scale = own
    flow_NN = (other[3] * (other[4] * scale)).sub_(mutual_NN * (agreement * scale * scale)).mul_(mutual_NN)
    flow_N = flow_NN.sum(1, dtype=accumulator(flow_NN.device)).to(flow_NN.dtype)
    softmax_NN = (logits_NN - normaliser_N.unsqueeze(1)).exp_().mul_(flow_N.unsqueeze(1))  # r_i P_ij
    return flow_NN.mul_(4).sub_(softmax_NN, alpha=2).sub_(softmax_NN.mT, alpha=2)
