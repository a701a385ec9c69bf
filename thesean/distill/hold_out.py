"""Batches of the user's own that training doesn't see: what chooses among states has to be told apart from what made
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from thesean.distill.callbacks import each_of
from thesean.errors import DataError

# One batch in eight, of eight or more; of four to seven one. Fewer are needed for training.
_ONE_IN, _MOST, _LEAST = 8, 4, 4


READ_ONCE = (
    "data gave no batch when it was read again. Pass a list or a DataLoader, or an object whose __iter__ starts anew."
)


class Divided(NamedTuple):
    """`held_out` None: nothing could be set apart, and `told` says why."""

    data: Iterable[Any]
    held_out: Iterable[Any] | None
    told: str


def hold_out(data: Iterable[Any], seed: int) -> Divided:
    """The last batches of a list, rows of a DataLoader's dataset, the first batches of what comes in one order.

    Raises DataError for what can be read only once.
    """
    measured = "no eval_data given: measured on training batches"
    if isinstance(data, Sequence):
        count = _share(len(data))
        if not count:
            return Divided(data, None, measured)
        return Divided(data[:-count], data[-count:], _told("last", count))
    if isinstance(data, DataLoader) and _is_plain(data):
        if not (count := _share(len(data))):
            return Divided(data, None, measured)
        return _rows_held_out(data, count * int(data.batch_size or 1), seed)
    count = _share(sum(1 for _ in itertools.islice(each_of(data, "data"), _ONE_IN * _MOST)))
    firsts = [next(each_of(data, "data"), None) for _ in range(2)]
    if any(first is None for first in firsts):
        raise DataError(READ_ONCE)
    if not count:
        return Divided(data, None, measured)
    if not _alike(*firsts):
        return Divided(data, None, f"{measured}, which come in another order each time")
    return Divided(_Rest(data, count), list(itertools.islice(each_of(data, "data"), count)), _told("first", count))


def _told(which: str, count: int) -> str:
    some = f"{which} batch of data was" if count == 1 else f"{which} {count} batches of data were"
    return f"no eval_data given: the {some} held out"


def _share(batches: int) -> int:
    return 0 if batches < _LEAST else min(_MOST, max(1, batches // _ONE_IN))


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether a loader draws single rows of a dataset that can be indexed, each once a pass."""
    plain = type(loader.sampler) is SequentialSampler or (
        type(loader.sampler) is RandomSampler and not loader.sampler.replacement
    )
    return loader.batch_size is not None and plain and hasattr(loader.dataset, "__getitem__")


def _rows_held_out(loader: DataLoader[Any], count: int, seed: int) -> Divided:
    """Any rows where the loader shuffles, the last ones where it doesn't."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    shuffles = isinstance(loader.sampler, RandomSampler)
    rows = list(range(total))
    if shuffles:
        rows = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    told = f"no eval_data given: {'' if shuffles else 'the last '}{count} of data's {total} rows were held out"
    return Divided(_over(loader, sorted(rows[:-count]), shuffles), _over(loader, sorted(rows[-count:]), False), told)


def _over(loader: DataLoader[Any], rows: list[int], shuffle: bool) -> DataLoader[Any]:
    """The loader over some rows of its dataset."""
    return DataLoader(
        Subset(loader.dataset, rows),
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last and shuffle,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


@dataclass(frozen=True)
class _Rest:
    """All but the first batches of each pass."""

    data: Iterable[Any]
    skipped: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.data, self.skipped, None)


def _alike(first: Any, second: Any) -> bool:
    """Whether two batches hold the same numbers."""
    mine, theirs = ([v for v in pytree.tree_leaves(b) if isinstance(v, torch.Tensor)] for b in (first, second))
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and bool(torch.equal(a, b)) for a, b in zip(mine, theirs, strict=True)
    )
