"""Inputs of other sizes, made of a few of the caller's own: a guide may not take what it was never given.

N rows of the example, M rows asked for
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

Dim = int | str

# Fewer rows than that are drawn around, not drawn from: what a region does to a few values tells little about it.
_ENOUGH = 16

# An example is kept with the signature, and saved with it: rows beyond this many bytes are left out.
_MOST_BYTES, _ROWS = 2**20, 4


def kept_example(value: torch.Tensor, batch: int | None) -> torch.Tensor:
    """What is remembered of an input: all of it, or where it is large its first rows along the dimension `batch`."""
    value = value.detach()
    if batch is not None and value.numel() * value.element_size() > _MOST_BYTES:
        value = value.narrow(batch, 0, min(_ROWS, value.shape[batch]))
    return value.cpu().clone()


def resampled(
    example: torch.Tensor,
    shape: Sequence[Dim],
    sizes: Mapping[str, int],
    before: Mapping[str, int],
    generator: torch.Generator,
    high: int | None = None,
    fresh: bool = False,
) -> torch.Tensor:
    """A value of `shape` at these `sizes`, like the example's, which is of the sizes `before`.

    Floats and features are rows of the example in another order, or values within its ranges where these are few or
    have to be `fresh`; indices below `high` lie between the example's least and greatest; offsets and positions rise
    as they did; lengths reach no further than what they count; a mask hides nothing.
    """
    wanted = [sizes[d] if isinstance(d, str) else d for d in shape]
    free = [at for at, d in enumerate(shape) if isinstance(d, str)]
    if example.is_floating_point() or example.is_complex():
        return _floats(example, free, wanted, generator, fresh)
    if _rises(example, free):
        return _counted(_continued(example, wanted), example, sizes, before, high)
    if example.ndim >= 2 and len(free) == example.ndim and high is None and is_mask(example):
        return torch.full(wanted, _visible(example), dtype=example.dtype)
    if high is not None and (fresh or len(free) == example.ndim):
        low, top = (int(v) for v in example.aminmax())
        low, top = (0, high - 1) if fresh or low == top or top >= high or low < 0 else (low, top)
        return torch.randint(low, top + 1, wanted, generator=generator, dtype=example.dtype)
    return _counted(_rows(example, free, wanted, generator), example, sizes, before, high)


def in_a_row(example: torch.Tensor, shape: Sequence[Dim], sizes: Mapping[str, int]) -> torch.Tensor | None:
    """The example's own sequences one after another, from a row of its own in each row, to a value of `shape`. None
    where that is another kind of input: positions, a mask, lengths.
    """
    free = [at for at, d in enumerate(shape) if isinstance(d, str)]
    if len(free) != 2 or not example.numel() or is_mask(example) or _rises(example, free):
        return None
    rows, steps = (sizes[str(shape[at])] for at in free)
    order = [*free, *(at for at in range(example.ndim) if at not in free)]
    have, long = example.shape[free[0]], example.shape[free[1]]
    flat_N = example.permute(order).flatten(0, 1)
    picks_MS = (torch.arange(rows).unsqueeze(1) * long + torch.arange(steps)) % (have * long)
    return flat_N[picks_MS].permute([order.index(at) for at in range(example.ndim)]).contiguous()


def is_of_pairs(shape: Sequence[Dim]) -> bool:
    """Whether an input says something of each pair of steps, as a mask of which of them may meet."""
    return len(shape) > 1 and isinstance(shape[-1], str) and shape[-1] == shape[-2]


def along_diagonals(example: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """(..., T, T) at another T: its first steps, and past the last one what stood as far apart from it: what looks back
    alone still does.
    """
    for at, size in enumerate(wanted[:-2]):
        example = example.index_select(at, torch.arange(size) % example.shape[at])
    last, step_T = example.shape[-1] - 1, torch.arange(wanted[-1])
    over_TT = (torch.maximum(step_T.unsqueeze(1), step_T) - last).clamp_min(0)
    row_TT, column_TT = ((place - over_TT).clamp_min(0) for place in (step_T.unsqueeze(1), step_T))
    return example[..., row_TT, column_TT]


def is_mask(example: torch.Tensor) -> bool:
    """Booleans, or integers that are 0 and 1."""
    return example.dtype == torch.bool or bool(((example == 0) | (example == 1)).all())


def _visible(mask: torch.Tensor) -> bool:
    """What a mask says where it hides nothing. Integers say 1. Booleans say either: padding is at one end of the rows,
    and the other end is visible in all of them; where that tells nothing, most are visible.
    """
    if mask.dtype != torch.bool:
        return True
    first, last = mask[..., 0], mask[..., -1]
    ends = [bool(end.flatten()[0]) for end in (first, last) if bool(end.all()) or not bool(end.any())]
    return ends[0] if len(ends) == 1 else bool(mask.float().mean() >= 0.5)


def all_shown(mask: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """A mask of floats that hides nothing: 0 where it is added to scores, or else as booleans would."""
    flags = mask.flatten(1) != 0
    return torch.full(list(wanted), 0.0 if bool((mask < 0).any()) else float(_visible(flags)), dtype=mask.dtype)


def sizes_of(shapes: Iterable[tuple[Sequence[Dim], torch.Tensor]]) -> dict[str, int]:
    """The sizes of dynamic dimensions in examples of which some were cut: the largest of each."""
    found: dict[str, int] = {}
    for shape, example in shapes:
        for dim, size in zip(shape, example.shape, strict=True):
            if isinstance(dim, str):
                found[dim] = max(found.get(dim, 0), size)
    return found


def _floats(
    example: torch.Tensor, free: list[int], wanted: list[int], generator: torch.Generator, fresh: bool
) -> torch.Tensor:
    if not example.numel():
        return torch.zeros(wanted, dtype=example.dtype)
    if example.is_complex():
        return _rows(example, free, wanted, generator)
    finite = example[example.isfinite()]
    low, high = finite.aminmax() if finite.numel() else (example.new_zeros(()), example.new_zeros(()))
    if low == high:  # zeros, ones: nothing is known of it but its sign
        noise = torch.randn(wanted, generator=generator, dtype=torch.float32).to(example.dtype)
        return noise if low == 0 else low * (noise / 2).exp()
    if _rises(example, free):
        return _continued(example, wanted)
    count = math.prod(example.shape[at] for at in free)
    whole = bool((example == example.round()).all())  # counts, one-hot features, masks of 0 and -inf
    if whole or len(finite) < example.numel() or (count >= _ENOUGH and not fresh):
        return _rows(example, free, wanted, generator)
    noise = torch.randn(wanted, generator=generator, dtype=torch.float32).to(example.dtype)
    if not free or count < 4:
        return (example.mean() + example.std() * noise).clamp(low, high)
    mean, std = example.mean(free, keepdim=True), example.std(free, keepdim=True)
    return torch.minimum(
        torch.maximum(mean + std * noise, example.amin(free, keepdim=True)), example.amax(free, keepdim=True)
    )


def _rows(example: torch.Tensor, free: list[int], wanted: list[int], generator: torch.Generator) -> torch.Tensor:
    """Whole slices along the `free` dimensions, in another order and as often as it takes; static ones stay whole."""
    free = free or ([0] if example.ndim > 1 else [])
    if not free or not example.numel():
        return example.clone() if list(example.shape) == wanted else example.new_zeros(wanted)
    order = [*free, *(at for at in range(example.ndim) if at not in free)]
    moved = example.permute(order)
    rows_N = moved.reshape(-1, *moved.shape[len(free) :])
    count = math.prod(wanted[at] for at in free)
    picks = [torch.randperm(len(rows_N), generator=generator) for _ in range(-(-count // len(rows_N)))]
    rows_M = rows_N[torch.cat(picks)[:count]] if picks else rows_N[:0]
    made = rows_M.reshape([wanted[at] for at in order])
    return made.permute([order.index(at) for at in range(example.ndim)]).contiguous()


def _rises(example: torch.Tensor, free: list[int]) -> bool:
    """Offsets, positions, times: never falling along the last dimension, which is a free one, and not constant."""
    if not free or free[-1] != example.ndim - 1 or example.dtype == torch.bool or example.shape[-1] < 3:
        return False
    steps = example.diff(dim=-1)
    return bool((steps >= 0).all() and (steps > 0).any(-1).all()) and not is_mask(example)


def _continued(example: torch.Tensor, wanted: list[int]) -> torch.Tensor:
    """The first entries along the last dimension, and more at the last one's distance; other dimensions repeat."""
    for at, size in enumerate(wanted[:-1]):
        example = example.index_select(at, torch.arange(size) % example.shape[at])
    have, step = example.shape[-1], example[..., -1:] - example[..., -2:-1]
    more = torch.arange(1, max(0, wanted[-1] - have) + 1).to(example.dtype)
    return torch.cat([example[..., : wanted[-1]], example[..., -1:] + step * more], -1)


def _counted(
    value: torch.Tensor,
    example: torch.Tensor,
    sizes: Mapping[str, int],
    before: Mapping[str, int],
    high: int | None,
) -> torch.Tensor:
    """Below `high`; without one, lengths and offsets shrink with the dimension that they count along."""
    if high is not None:
        return value.clamp(max=high - 1)
    if example.dtype == torch.bool or not example.numel() or is_mask(example):
        return value
    least, most = (int(v) for v in example.aminmax())
    counts = min((d for d, size in before.items() if size >= most), key=before.__getitem__, default=None)
    if counts is None or least < 0 or counts not in sizes:
        return value
    old, new = before[counts], sizes[counts]
    if new < old:
        value = -(-value * new // old)  # rounded up: no length becomes nothing
    # what never reaches the end is an index, and stays one
    return value.clamp(max=max(new - (most < old), min(least, new)))
