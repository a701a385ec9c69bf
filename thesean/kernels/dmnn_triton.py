"""D-MNN on a GPU, from stored Grams: no softmax, logit or M is ever written to memory.

Three passes over both Grams at once: the normalisers of both softmaxes; the rows' sums of M products; and both sides'
gradient weights. The second must know every normaliser, the third the sums. M is symmetric and follows from a Gram's
entry and two normalisers, so no pass reads a transpose. Rows' sums go to rows of their own and are added up in float64:
no atomics, runs agree to the bit. The equations are those of `thesean.kernels.dmnn`.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from thesean.kernels.dmnn import directions
from thesean.kernels.shared.device_triton import device_of
from thesean.kernels.shared.grams_triton import gram_pair
from thesean.kernels.shared.launches import launch
from thesean.kernels.shared.precision import full_precision, widen


@triton.jit
def load_logits(gram, rows, cols, N, sharpness):
    """s_ij, minus infinity on the diagonal and past the end: neighbours of none."""
    use = (rows[:, None] < N) & (cols[None, :] < N) & (rows[:, None] != cols[None, :])
    at = gram + rows.to(tl.int64)[:, None] * N + cols[None, :]
    return tl.where(use, tl.load(at, mask=use, other=0.0) * sharpness, float("-inf"))


@triton.jit
def grow_normaliser(logits, largest, total):
    """A row's running maximum and sum of exponentials above it."""
    larger = tl.maximum(largest, tl.max(logits, axis=1))
    safe = tl.where(larger == float("-inf"), 0.0, larger)  # nothing but the diagonal so far
    return larger, total * tl.exp(largest - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)


@triton.jit(do_not_specialize=["N"])
def normalisers_kernel(gram_x, gram_y, normalisers, N, sharpness, ROWS: tl.constexpr, COLS: tl.constexpr):
    """logsumexp of the rows of both sides -> normalisers_2N. Grid: (ceil(N / ROWS),)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest_x = tl.full((ROWS,), float("-inf"), tl.float32)
    largest_y = tl.full((ROWS,), float("-inf"), tl.float32)
    total_x = tl.zeros((ROWS,), tl.float32)
    total_y = tl.zeros((ROWS,), tl.float32)
    for start in range(0, N, COLS):
        cols = start + tl.arange(0, COLS)
        largest_x, total_x = grow_normaliser(load_logits(gram_x, rows, cols, N, sharpness), largest_x, total_x)
        largest_y, total_y = grow_normaliser(load_logits(gram_y, rows, cols, N, sharpness), largest_y, total_y)
    inside = rows < N
    tl.store(normalisers + rows, largest_x + tl.log(tl.where(inside, total_x, 1.0)), mask=inside)
    tl.store(normalisers + N + rows, largest_y + tl.log(tl.where(inside, total_y, 1.0)), mask=inside)


@triton.jit
def load_mutual(gram, normalisers, rows, cols, N, sharpness):
    """M_ij = exp(2 s_ij - l_i - l_j), and s_ij."""
    logits = load_logits(gram, rows, cols, N, sharpness)
    own = tl.load(normalisers + rows, mask=rows < N, other=0.0)
    theirs = tl.load(normalisers + cols, mask=cols < N, other=0.0)
    return tl.exp(2.0 * logits - own[:, None] - theirs[None, :]), logits, own, theirs


@triton.jit(do_not_specialize=["N"])
def agreement_kernel(
    gram_x,
    gram_y,
    normalisers,
    scales,
    sums,
    N,
    sharpness,
    DISTANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Row sums of Mx My, Mx^2, My^2 -> sums_3N in float64; or of (Mx / |Mx| - My / |My|)^2 -> sums_N."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    both = tl.zeros((ROWS,), tl.float64)
    own_x = tl.zeros((ROWS,), tl.float64)
    own_y = tl.zeros((ROWS,), tl.float64)
    for start in range(0, N, COLS):
        cols = start + tl.arange(0, COLS)
        mx, _, _, _ = load_mutual(gram_x, normalisers, rows, cols, N, sharpness)
        my, _, _, _ = load_mutual(gram_y, normalisers + N, rows, cols, N, sharpness)
        if DISTANCE:
            apart = mx * tl.load(scales) - my * tl.load(scales + 1)
            both += tl.sum(apart * apart, axis=1).to(tl.float64)
        else:
            both += tl.sum(mx * my, axis=1).to(tl.float64)
            own_x += tl.sum(mx * mx, axis=1).to(tl.float64)
            own_y += tl.sum(my * my, axis=1).to(tl.float64)
    tl.store(sums + rows, both, mask=inside)
    if not DISTANCE:
        tl.store(sums + N + rows, own_x, mask=inside)
        tl.store(sums + 2 * N + rows, own_y, mask=inside)


@triton.jit
def side_weight(flow, own_flow, their_flow, logits, own, theirs):
    """4 G M - 2 (r_i P_ij + r_j P_ji), where flow is G M."""
    softmaxes = own_flow[:, None] * tl.exp(logits - own[:, None])
    softmaxes += their_flow[None, :] * tl.exp(logits - theirs[None, :])
    return 4.0 * flow - 2.0 * softmaxes


@triton.jit(do_not_specialize=["N"])
def weights_kernel(
    gram_x,
    gram_y,
    normalisers,
    flows,
    factors,
    weight_x,
    weight_y,
    N,
    sharpness,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """W_NN of x, or of both sides in the same pass. flows_2N: r of x and of y. Grid: (ceil(N / ROWS), ceil(N / COLS)).

    factors: 1/(|Mx||My|), agreement/|Mx|^2, agreement/|My|^2, so that G = factor_0 M_other - factor_own M_own.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mx, logits_x, own_x, theirs_x = load_mutual(gram_x, normalisers, rows, cols, N, sharpness)
    my, logits_y, own_y, theirs_y = load_mutual(gram_y, normalisers + N, rows, cols, N, sharpness)
    cross = tl.load(factors)
    flow_x = (cross * my - tl.load(factors + 1) * mx) * mx
    rx = tl.load(flows + rows, mask=rows < N, other=0.0)
    cx = tl.load(flows + cols, mask=cols < N, other=0.0)
    inside = (rows[:, None] < N) & (cols[None, :] < N)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(weight_x + at, side_weight(flow_x, rx, cx, logits_x, own_x, theirs_x), mask=inside)
    if BOTH:
        flow_y = (cross * mx - tl.load(factors + 2) * my) * my
        ry = tl.load(flows + N + rows, mask=rows < N, other=0.0)
        cy = tl.load(flows + N + cols, mask=cols < N, other=0.0)
        tl.store(weight_y + at, side_weight(flow_y, ry, cy, logits_y, own_y, theirs_y), mask=inside)


def dmnn(x_NP: torch.Tensor, y: torch.Tensor, *, temperature: float, prepared: bool = False) -> torch.Tensor:
    """As `thesean.kernels.dmnn.dmnn`: x_NP, and y_NQ or its cosines -> float32 scalar. ValueError for float64."""
    return _run(x_NP, y, temperature, prepared, distance=False)


def dmnn_distance(x_NP: torch.Tensor, y: torch.Tensor, *, temperature: float, prepared: bool = False) -> torch.Tensor:
    """As `thesean.kernels.dmnn.dmnn_distance`: half the squared distance of the normalised M, a float32 scalar."""
    return _run(x_NP, y, temperature, prepared, distance=True)


def _run(x_NP: torch.Tensor, y: torch.Tensor, temperature: float, prepared: bool, distance: bool) -> torch.Tensor:
    # in float32 whatever the features were: a temperature of 0.1 makes a cosine's error ten times larger
    x_NP, y = widen(x_NP, y)
    launch("dmnn", x_NP.device, x_NP.dtype)  # refuses float64 by this operation's name
    y_NQ, cosines_y_NN = (None, y.detach()) if prepared else (directions(y), None)
    value: torch.Tensor = _DMNN.apply(directions(x_NP), y_NQ, cosines_y_NN, temperature, distance)
    return value


class _DMNN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NP: torch.Tensor,
        y_NQ: torch.Tensor | None,
        cosines_y_NN: torch.Tensor | None,
        temperature: float,
        distance: bool,
    ) -> torch.Tensor:
        n, device = x_NP.shape[0], x_NP.device
        x_NP, y_NQ = x_NP.contiguous(), None if y_NQ is None else y_NQ.contiguous()
        gram_x_NN, gram_y_NN, _ = gram_pair(x_NP, y_NQ, cosines_y_NN)
        normaliser_2N = torch.empty(2, n, device=device)
        sum_3N = torch.empty(3, n, device=device, dtype=torch.float64)
        entry = launch("dmnn", device, torch.float32)
        blocks = dict(ROWS=entry.block, COLS=entry.depth, **entry.options)
        grid, grams, sharpness = (triton.cdiv(n, entry.block),), (gram_x_NN, gram_y_NN), 1 / temperature
        with device_of(x_NP):
            normalisers_kernel[grid](*grams, normaliser_2N, n, sharpness, **blocks)
            agreement_kernel[grid](*grams, normaliser_2N, sum_3N, sum_3N, n, sharpness, DISTANCE=False, **blocks)
            both, x_scale, y_scale = _scales(sum_3N)
            value = both * x_scale * y_scale
            if distance:
                scale_2, apart_N = torch.stack([x_scale, y_scale]).float(), torch.empty_like(sum_3N[0])
                agreement_kernel[grid](*grams, normaliser_2N, scale_2, apart_N, n, sharpness, DISTANCE=True, **blocks)
                value = apart_N.sum() / 2
        ctx.save_for_backward(x_NP, y_NQ, *grams, normaliser_2N, sum_3N, value)
        ctx.sharpness, ctx.distance = sharpness, distance
        return value.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NP, y_NQ, gram_x_NN, gram_y_NN, normaliser_2N, sum_3N, value = ctx.saved_tensors
        similarity, grad = (1 - value, -grad) if ctx.distance else (value, grad)
        _, x_scale, y_scale = _scales(sum_3N)
        factor_3 = torch.stack([x_scale * y_scale, similarity * x_scale * x_scale, similarity * y_scale * y_scale])
        flow_2N = (factor_3[0] * sum_3N[0] - factor_3[1:, None] * sum_3N[1:]).float()
        both = ctx.needs_input_grad[1]
        weight_x_NN = torch.empty_like(gram_x_NN)
        weight_y_NN = torch.empty_like(gram_y_NN) if both else weight_x_NN  # not written then
        n, entry = x_NP.shape[0], launch("dmnn", x_NP.device, torch.float32)
        with device_of(x_NP):
            weights_kernel[(triton.cdiv(n, entry.block), triton.cdiv(n, entry.depth))](
                *(gram_x_NN, gram_y_NN, normaliser_2N, flow_2N, factor_3.float()),
                *(weight_x_NN, weight_y_NN, n, ctx.sharpness),
                BOTH=both,
                ROWS=entry.block,
                COLS=entry.depth,
                **entry.options,
            )
        grads: list[torch.Tensor | None] = [None, None]
        with full_precision(grad.device):
            for i, (weight_NN, z_NP) in enumerate(((weight_x_NN, x_NP), (weight_y_NN, y_NQ))):
                if ctx.needs_input_grad[i]:
                    grads[i] = (weight_NN @ z_NP).mul_(grad * ctx.sharpness)
        return (*grads, None, None, None)


def _scales(sum_3N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """<Mx, My>, 1 / |Mx| and 1 / |My|."""
    both, x_squares, y_squares = sum_3N.sum(1).unbind()
    return both, x_squares.rsqrt(), y_squares.rsqrt()
