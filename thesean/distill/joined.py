"""What a module reads and is to give on small batches, several as one: its weights are made ready less often so.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

# Numbers that a module reads at once: past it nothing is won, and memory lost.
_MOST = 2**20


class Given(NamedTuple):
    """Of the batches of these `numbers` and `sizes`, one after the other along the first dimension: what a module
    reads, the guide's value where it ends, and what of that it is to give itself; the steps that it is told of, and
    those that count, None for all.
    """

    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    x: torch.Tensor
    target: torch.Tensor
    residual: torch.Tensor
    read_BT: torch.Tensor | None = None
    mask_BT: torch.Tensor | None = None

    def first(self, rows: int) -> int:
        """How many of all rows that count are the first batch's."""
        return rows * self.sizes[0] // sum(self.sizes)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x, self.target, self.residual


def joined(givens: Iterable[Given], apart: bool = False) -> Iterator[Given]:
    """In order, neighbours as one while they are small, of one shape but for the batch, and hide no step; or, where
    they are to stay `apart`, each by itself.
    """
    waiting: list[Given] = []
    for given in givens:
        if waiting and (apart or not _join([*waiting, given])):
            yield _one(waiting)
            waiting = []
        waiting.append(given)
    if waiting:
        yield _one(waiting)


def _join(givens: list[Given]) -> bool:
    masked = any(given.read_BT is not None or given.mask_BT is not None for given in givens)
    shapes = {tuple(tensor.shape[1:] for tensor in given.tensors) for given in givens}
    return not masked and len(shapes) == 1 and sum(given.x.numel() for given in givens) <= _MOST


def _one(givens: list[Given]) -> Given:
    if len(givens) == 1:
        return givens[0]
    numbers, sizes = (sum(parts, ()) for parts in zip(*((given.numbers, given.sizes) for given in givens), strict=True))
    x, target, residual = (torch.cat(parts) for parts in zip(*(given.tensors for given in givens), strict=True))
    return Given(numbers, sizes, x, target, residual)
