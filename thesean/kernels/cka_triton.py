"""Linear CKA on a GPU: both Grams and all their sums from one kernel, the gradient from one matrix product a side.

The algebra is that of `thesean.kernels.cka`, in Gram form. Nothing waits for the GPU: scalars stay on the device.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from thesean.kernels.cka import CentredGram
from thesean.kernels.shared.grams_triton import apart_sums, centre, gram_pair
from thesean.kernels.shared.launches import HALF
from thesean.kernels.shared.precision import full_precision


def cka(x_NP: torch.Tensor, y: torch.Tensor | CentredGram, *, debiased: bool) -> torch.Tensor:
    """As `thesean.kernels.cka.cka`: x_NP, and y_NQ or a prepared guide -> float32 scalar.

    Features are read in their own dtype: half precision runs on the tensor cores as it is, float32 as three tf32
    products. Raises ValueError for float64.
    """
    return _run(x_NP, y, debiased, distance=False)


def cka_distance(x_NP: torch.Tensor, y: torch.Tensor | CentredGram, *, debiased: bool) -> torch.Tensor:
    """As `thesean.kernels.cka.cka_distance`: half the squared distance of the normalised Grams, a float32 scalar."""
    return _run(x_NP, y, debiased, distance=True)


def _run(x_NP: torch.Tensor, y: torch.Tensor | CentredGram, debiased: bool, distance: bool) -> torch.Tensor:
    gram = None
    if isinstance(y, CentredGram):
        y_NQ, gram = y.centred_NP, y.gram if y.form == "gram" else None
    else:
        y_NQ = y
    if y_NQ is not None and y_NQ.dtype != x_NP.dtype:
        dtype = torch.promote_types(torch.promote_types(x_NP.dtype, y_NQ.dtype), torch.float32)
        x_NP, y_NQ = x_NP.to(dtype), y_NQ.to(dtype)
    value: torch.Tensor = _CKA.apply(x_NP, y_NQ if gram is None else None, gram, debiased, distance)
    return value


class _CKA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NP: torch.Tensor,
        y_NQ: torch.Tensor | None,
        gram_y_NN: torch.Tensor | None,
        debiased: bool,
        distance: bool,
    ) -> torch.Tensor:
        n = x_NP.shape[0]
        x_NP = centre(x_NP)
        y_NQ = None if y_NQ is None else centre(y_NQ)
        gram_x_NN, gram_y_NN, sum_S = gram_pair(x_NP, y_NQ, gram_y_NN)
        xy, xx, yy, xy_diagonal, xx_diagonal, yy_diagonal, x_trace, y_trace = sum_S.unbind()
        x_scale = _self_scale(_hsic(n, xx, xx_diagonal, x_trace * x_trace, debiased), xx + xx_diagonal)
        y_scale = _self_scale(_hsic(n, yy, yy_diagonal, y_trace * y_trace, debiased), yy + yy_diagonal)
        if distance:
            off, diagonal, trace = apart_sums(gram_x_NN, gram_y_NN, torch.stack([x_scale, y_scale])).unbind()
            value = _hsic(n, off, diagonal, trace * trace, debiased) / 2
        else:
            value = _hsic(n, xy, xy_diagonal, x_trace * y_trace, debiased) * (x_scale * y_scale)
        ctx.save_for_backward(x_NP, y_NQ, gram_x_NN, gram_y_NN, x_scale, y_scale, value)
        ctx.debiased, ctx.distance = debiased, distance
        return value.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NP, y_NQ, gram_x_NN, gram_y_NN, x_scale, y_scale, value = ctx.saved_tensors
        agreement, grad = (1 - value, -grad) if ctx.distance else (value, grad)
        x, y = (gram_x_NN, x_scale), (gram_y_NN, y_scale)
        grad_x_NP = grad_y_NQ = None
        with full_precision(grad.device):
            if ctx.needs_input_grad[0]:
                grad_x_NP = _gradient(x_NP, x, y, agreement, grad, ctx.debiased)
            if ctx.needs_input_grad[1]:
                grad_y_NQ = _gradient(y_NQ, y, x, agreement, grad, ctx.debiased)
        return grad_x_NP, grad_y_NQ, None, None, None


def _hsic(n: int, off: torch.Tensor, diagonal: torch.Tensor, traces: torch.Tensor, debiased: bool) -> torch.Tensor:
    """<k, l> from the sums off and on the diagonal, and the product of the traces."""
    return off - diagonal * (2 / (n - 2)) + traces / ((n - 1) * (n - 2)) if debiased else off + diagonal


def _self_scale(hsic: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(hsic(x, x)); NaN where that is nothing but rounding, as for features that do not vary."""
    return torch.where(hsic > 4 * torch.finfo(torch.float32).eps * energy, hsic, torch.nan).rsqrt()


def _gradient(
    own_NP: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
    agreement: torch.Tensor,
    grad: torch.Tensor,
    debiased: bool,
) -> torch.Tensor:
    """2 W Xc, W = a L - b K + c_j (delta_ij - 1/n), as in `thesean.kernels.cka`. own, other: Gram and scale."""
    (gram_NN, scale), (other_NN, other_scale) = own, other
    n = gram_NN.shape[0]
    # n W / scale: of the order of one at any n, which fp16 needs
    weight_NN = (other_NN * (n * other_scale)).sub_(gram_NN * (n * scale * agreement))
    if debiased:
        diagonal_N = weight_NN.diagonal().double()
        slope_N = (diagonal_N.sum() / ((n - 1) * (n - 2)) - diagonal_N * (n / (n - 2))).float()
        weight_NN.sub_(slope_N / n).diagonal().add_(slope_N)
    weight_NN = weight_NN.to(own_NP.dtype)
    if own_NP.is_cuda and own_NP.dtype in HALF:
        product_NP = torch.mm(weight_NN, own_NP, out_dtype=torch.float32)  # fp16 would overflow
    else:
        product_NP = weight_NN.float() @ own_NP.float()
    return product_NP.mul_(2 * grad * scale / n).to(own_NP.dtype)
