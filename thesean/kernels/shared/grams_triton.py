"""Gram matrices and the sums of them, by the kernels of `gram_triton`: what CKA, D-MNN and `centred_gram` launch.

N examples, P width of x, Q width of y, T tiles, S slices of the features
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from thesean.kernels.shared.device_triton import device_of, interpreting
from thesean.kernels.shared.gram_triton import SUMS, apart_kernel, join_kernel, pair_kernel, slice_kernel
from thesean.kernels.shared.launches import HALF, Launch, launch, slices
from thesean.kernels.shared.precision import centred


def centre(x_NP: torch.Tensor) -> torch.Tensor:
    """In float32, and rounded to half precision only after: at an offset of 50, bf16 holds no digit of the rest."""
    return centred(x_NP.float()).to(x_NP.dtype).contiguous()


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
    x_NP = _aligned(centre(x_NP))
    entry = launch("cka", x_NP.device, x_NP.dtype)
    return _sliced(x_NP, _tiles(x_NP.shape[0], entry.block), entry)


def apart_sums(gram_x_NN: torch.Tensor, gram_y_NN: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """The sums of scale_2[0] gram_x_NN - scale_2[1] gram_y_NN in float64: off the diagonal, on it, the trace."""
    entry = launch("gram_statistics", gram_x_NN.device, torch.float32)
    n = gram_x_NN.shape[0]
    tiles = _tiles(n, entry.block)
    sums_T3 = torch.empty(tiles, 3, device=gram_x_NN.device, dtype=torch.float64)
    with device_of(gram_x_NN):
        apart_kernel[(tiles,)](gram_x_NN, gram_y_NN, scale_2.float(), sums_T3, n, BLOCK=entry.block, **entry.options)
    return sums_T3.sum(0)


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


def _tiles(n: int, block: int) -> int:
    rows = triton.cdiv(n, block)
    return int(rows * (rows + 1) // 2)
