"""Linear CKA on a GPU: both Grams and all their sums from one kernel, the gradient from one matrix product a side.

The algebra is that of `thesean.kernels.cka`, in Gram form. Nothing waits for the GPU: scalars stay on the device.

N examples, P width of x, Q width of y, T tiles, S slices of the features
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from thesean.kernels.cka import CentredGram
from thesean.kernels.shared.device_triton import device_of, interpreting
from thesean.kernels.shared.gram_triton import SUMS, apart_kernel, join_kernel, pair_kernel, slice_kernel
from thesean.kernels.shared.launches import HALF, Launch, launch, slices
from thesean.kernels.shared.precision import centred, full_precision


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
        x_NP = _centre(x_NP)
        y_NQ = None if y_NQ is None else _centre(y_NQ)
        gram_x_NN, gram_y_NN, sum_S = gram_pair(x_NP, y_NQ, gram_y_NN)
        xy, xx, yy, xy_diagonal, xx_diagonal, yy_diagonal, x_trace, y_trace = sum_S.unbind()
        x_scale = _self_scale(_hsic(n, xx, xx_diagonal, x_trace * x_trace, debiased), xx + xx_diagonal)
        y_scale = _self_scale(_hsic(n, yy, yy_diagonal, y_trace * y_trace, debiased), yy + yy_diagonal)
        if distance:
            off, diagonal, trace = _apart(gram_x_NN, gram_y_NN, torch.stack([x_scale, y_scale])).unbind()
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


def gram_pair(
    x_NP: torch.Tensor, y_NQ: torch.Tensor | None, gram_y_NN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both Grams in float32, y's as given or from centred y_NQ, and the sums of `gram_triton.SUMS` in float64."""
    x_NP, y_NQ = _aligned(x_NP), None if y_NQ is None else _aligned(y_NQ)
    n, width = x_NP.shape
    entry = launch("cka", x_NP.device, x_NP.dtype)
    tiles = _tiles(n, entry.block)
    gram_x_NN = torch.empty(n, n, device=x_NP.device)
    with device_of(x_NP):
        if y_NQ is not None and slices(x_NP.device, tiles, max(width, y_NQ.shape[1]), entry) == 1:
            gram_y_NN = torch.empty_like(gram_x_NN)
            sums_TS = torch.empty(tiles, SUMS, device=x_NP.device, dtype=torch.float64)
            pair_kernel[(tiles,)](
                *(x_NP, y_NQ, gram_x_NN, gram_y_NN, sums_TS, n, width, y_NQ.shape[1]),
                **_product_of(entry, x_NP.dtype),
            )
            return gram_x_NN, gram_y_NN, sums_TS.sum(0)
        slices_x_SNN = _sliced(x_NP, tiles, entry)
        slices_y_SNN = slices_x_SNN if y_NQ is None else _sliced(y_NQ, tiles, entry)
        gram_y_NN = torch.empty_like(gram_x_NN) if gram_y_NN is None else gram_y_NN.float().contiguous()
        join = launch("gram_statistics", x_NP.device, torch.float32)
        tiles = _tiles(n, join.block)
        sums_TS = torch.empty(tiles, SUMS, device=x_NP.device, dtype=torch.float64)
        join_kernel[(tiles,)](
            *(slices_x_SNN, slices_y_SNN, gram_x_NN, gram_y_NN, sums_TS, n),
            *(slices_x_SNN.shape[0], slices_y_SNN.shape[0]),
            STORED_Y=y_NQ is None,
            BLOCK=join.block,
            **join.options,
        )
    return gram_x_NN, gram_y_NN, sums_TS.sum(0)


def lower_slices(x_NP: torch.Tensor) -> torch.Tensor:
    """Slices over the features of the centred Gram, which they add up to: x_NP -> (S, N, N), lower triangles only."""
    x_NP = _aligned(_centre(x_NP))
    entry = launch("cka", x_NP.device, x_NP.dtype)
    return _sliced(x_NP, _tiles(x_NP.shape[0], entry.block), entry)


def _aligned(x_NP: torch.Tensor) -> torch.Tensor:
    """Zeros up to a multiple of 16 features: they add nothing, and rows that aren't aligned are loaded singly."""
    missing = -x_NP.shape[1] % 16
    return torch.nn.functional.pad(x_NP, (0, missing)) if missing else x_NP


def _sliced(x_NP: torch.Tensor, tiles: int, entry: Launch) -> torch.Tensor:
    n, width = x_NP.shape
    count = slices(x_NP.device, tiles, width, entry)
    each = triton.cdiv(triton.cdiv(width, count), entry.depth) * entry.depth
    count = triton.cdiv(width, each)
    slices_SNN = torch.empty(count, n, n, device=x_NP.device)
    slice_kernel[(tiles, count)](x_NP, slices_SNN, n, width, each, **_product_of(entry, x_NP.dtype))
    return slices_SNN


def _product_of(entry: Launch, dtype: torch.dtype) -> dict[str, Any]:
    widen = interpreting() and dtype in HALF
    return dict(BLOCK=entry.block, DEPTH=entry.depth, PREC=entry.precision, WIDEN=widen, **entry.options)


def _apart(gram_x_NN: torch.Tensor, gram_y_NN: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    entry = launch("gram_statistics", gram_x_NN.device, torch.float32)
    n = gram_x_NN.shape[0]
    tiles = _tiles(n, entry.block)
    sums_T3 = torch.empty(tiles, 3, device=gram_x_NN.device, dtype=torch.float64)
    with device_of(gram_x_NN):
        apart_kernel[(tiles,)](gram_x_NN, gram_y_NN, scale_2.float(), sums_T3, n, BLOCK=entry.block, **entry.options)
    return sums_T3.sum(0)


def _tiles(n: int, block: int) -> int:
    rows = triton.cdiv(n, block)
    return int(rows * (rows + 1) // 2)


def _centre(x_NP: torch.Tensor) -> torch.Tensor:
    """In float32, and rounded to half precision only after: at an offset of 50, bf16 holds no digit of the rest."""
    return centred(x_NP.float()).to(x_NP.dtype).contiguous()


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
