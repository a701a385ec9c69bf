"""Gram matrices of two sides at once, with all the sums that CKA needs taken while the tiles are in registers.

A Gram is symmetric: programs compute the lower triangle's tiles and store each twice. Every program writes its sums to
a row of its own, which the caller adds up in float64: two passes and no atomics, so that runs agree to the bit.
With few tiles, `slice_kernel` spreads the features over programs as well and `join_kernel` adds up the slices.

One kernel serves every N, unspecialised: what is checked ahead of time is then what runs. Widths are multiples of 16.

N examples, P width of x, Q width of y; all features are centred before
"""

from __future__ import annotations

import triton
import triton.language as tl

SUMS = 8  # a tile's: off-diagonal <k,l> <k,k> <l,l>, diagonal <k,l> <k,k> <l,l>, trace k, trace l


@triton.jit
def tile_of(t):
    """Row and column of the t-th tile of a lower triangle."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root in float32 can be one off
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def gram_tile(
    x, rows, cols, N, P, first, last, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PREC: tl.constexpr, WIDEN: tl.constexpr
):
    """x_NP[rows] x_NP[cols]^T over the features first <= p < last."""
    gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    at_rows = x + rows.to(tl.int64)[:, None] * P
    at_cols = x + cols.to(tl.int64)[:, None] * P
    for start in range(first, last, DEPTH):
        p = start + tl.arange(0, DEPTH)
        a = tl.load(at_rows + p[None, :], mask=(rows[:, None] < N) & (p[None, :] < last), other=0.0)
        b = tl.load(at_cols + p[None, :], mask=(cols[:, None] < N) & (p[None, :] < last), other=0.0)
        if WIDEN:  # the interpreter's tl.dot is silently wrong in bf16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        gram = tl.dot(a, tl.trans(b), gram, input_precision=PREC)
    return gram


@triton.jit
def exact_sum(tile):
    """Rows in float32, the rows' sums in float64."""
    return tl.sum(tl.sum(tile, axis=1).to(tl.float64), axis=0)


@triton.jit
def store_sums(k, l, sums, t, i, j, rows, cols):
    """The diagonal apart: the debiased HSIC takes most of it away again, and would lose the digits of the rest."""
    diagonal = rows[:, None] == cols[None, :]
    k_off = tl.where(diagonal, 0.0, k)
    l_off = tl.where(diagonal, 0.0, l)
    k_diagonal = tl.sum(tl.where(diagonal, k, 0.0), axis=1).to(tl.float64)
    l_diagonal = tl.sum(tl.where(diagonal, l, 0.0), axis=1).to(tl.float64)
    twice = tl.where(i == j, 1.0, 2.0)
    out = sums + t.to(tl.int64) * 8
    tl.store(out, exact_sum(k_off * l_off) * twice)
    tl.store(out + 1, exact_sum(k_off * k_off) * twice)
    tl.store(out + 2, exact_sum(l_off * l_off) * twice)
    tl.store(out + 3, tl.sum(k_diagonal * l_diagonal, axis=0))
    tl.store(out + 4, tl.sum(k_diagonal * k_diagonal, axis=0))
    tl.store(out + 5, tl.sum(l_diagonal * l_diagonal, axis=0))
    tl.store(out + 6, tl.sum(k_diagonal, axis=0))
    tl.store(out + 7, tl.sum(l_diagonal, axis=0))


@triton.jit
def store_tile(gram, tile, i, j, rows, cols, N):
    inside = (rows[:, None] < N) & (cols[None, :] < N)
    tl.store(gram + rows.to(tl.int64)[:, None] * N + cols[None, :], tile, mask=inside)
    if i != j:
        mirrored = (cols[:, None] < N) & (rows[None, :] < N)
        tl.store(gram + cols.to(tl.int64)[:, None] * N + rows[None, :], tl.trans(tile), mask=mirrored)


@triton.jit
def load_tile(gram, rows, cols, N):
    inside = (rows[:, None] < N) & (cols[None, :] < N)
    return tl.load(gram + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["N"])
def pair_kernel(
    x,
    y,
    gram_x,
    gram_y,
    sums,
    N,
    P,
    Q,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PREC: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """x_NP, y_NQ -> gram_x_NN, gram_y_NN, sums_TS. Grid: (tiles of the lower triangle,)."""
    t = tl.program_id(0)
    i, j = tile_of(t)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    k = gram_tile(x, rows, cols, N, P, 0, P, BLOCK, DEPTH, PREC, WIDEN)
    store_tile(gram_x, k, i, j, rows, cols, N)
    l = gram_tile(y, rows, cols, N, Q, 0, Q, BLOCK, DEPTH, PREC, WIDEN)
    store_tile(gram_y, l, i, j, rows, cols, N)
    store_sums(k, l, sums, t, i, j, rows, cols)


@triton.jit(do_not_specialize=["N"])
def slice_kernel(
    x, slices, N, P, WIDTH, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PREC: tl.constexpr, WIDEN: tl.constexpr
):
    """x_NP -> slices_SNN, lower triangles only, slice s over the features from s * WIDTH. Grid: (tiles, slices)."""
    i, j = tile_of(tl.program_id(0))
    s = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    k = gram_tile(x, rows, cols, N, P, s * WIDTH, tl.minimum((s + 1) * WIDTH, P), BLOCK, DEPTH, PREC, WIDEN)
    inside = (rows[:, None] < N) & (cols[None, :] < N)
    out = slices + s.to(tl.int64) * N * N
    tl.store(out + rows.to(tl.int64)[:, None] * N + cols[None, :], k, mask=inside)


@triton.jit(do_not_specialize=["N", "SX", "SY"])
def join_kernel(slices_x, slices_y, gram_x, gram_y, sums, N, SX, SY, STORED_Y: tl.constexpr, BLOCK: tl.constexpr):
    """slices_x_SNN, slices_y_SNN -> gram_x_NN, gram_y_NN, sums_TS, the slices in order. Grid: (tiles,).

    STORED_Y: gram_y_NN is given, slices_y_SNN not read.
    """
    t = tl.program_id(0)
    i, j = tile_of(t)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    area = tl.cast(N, tl.int64) * N
    k = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for s in range(SX):
        k += load_tile(slices_x + s * area, rows, cols, N)
    store_tile(gram_x, k, i, j, rows, cols, N)
    if STORED_Y:
        l = load_tile(gram_y, rows, cols, N)
    else:
        l = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for s in range(SY):
            l += load_tile(slices_y + s * area, rows, cols, N)
        store_tile(gram_y, l, i, j, rows, cols, N)
    store_sums(k, l, sums, t, i, j, rows, cols)


@triton.jit(do_not_specialize=["N"])
def apart_kernel(gram_x, gram_y, scales, sums, N, BLOCK: tl.constexpr):
    """The sums of scales[0] gram_x - scales[1] gram_y: off-diagonal squares, diagonal squares, trace. Grid: (tiles,).

    Zero where the scaled Grams are equal, which the difference of sums of each would not be.
    """
    t = tl.program_id(0)
    i, j = tile_of(t)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    k = load_tile(gram_x, rows, cols, N) * tl.load(scales)
    apart = k - load_tile(gram_y, rows, cols, N) * tl.load(scales + 1)
    diagonal = rows[:, None] == cols[None, :]
    off = tl.where(diagonal, 0.0, apart)
    on = tl.sum(tl.where(diagonal, apart, 0.0), axis=1).to(tl.float64)
    out = sums + t.to(tl.int64) * 3
    tl.store(out, exact_sum(off * off) * tl.where(i == j, 1.0, 2.0))
    tl.store(out + 1, tl.sum(on * on, axis=0))
    tl.store(out + 2, tl.sum(on, axis=0))
