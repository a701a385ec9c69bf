"""Batches pass after pass, from a place that can be found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from thesean import ranks
from thesean.distill.hold_out import READ_ONCE
from thesean.distill.random_state import RandomState
from thesean.distill.task import Batch
from thesean.errors import DataError, ResumeError

_MOST_ROWS, _MOST_VALUES = 2**20, 4096  # that are remembered, and looked at of one


class Stream(Iterator[Batch]):
    """One place in the data for all phases of a run. `new`: batches' worth of rows that hadn't come before.

    A pass that is shuffled draws from the random state when it begins, so that is kept with the place in it. Going on
    reads the pass again up to there, when the next batch is asked for, and raises ResumeError where it holds others.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.new = 0.0
        self._rows: set[str] | None = set()  # hashes of those that came in the first pass, which has all there are
        self._items: Iterator[Batch] | None = None
        self._begun: Any = None  # random state before the pass
        self._place, self._last = 0, ""  # batches read of it, and what the last one holds
        self._held: Batch | None = None
        self._looking = False  # for the place

    def __next__(self) -> Batch:
        if self._looking:
            self._go_on()
        for _ in range(2):
            if self._items is None:
                self._begin()
            assert self._items is not None
            batch = next(self._items, None)
            if batch is not None:
                self._place, self._last = self._place + 1, ""
                self._held = batch
                self._remember(batch, counted=True)
                if self._place == 1:
                    check_same(batch)
                return batch
            if self._place == 0:
                break
            self._rows, self._items = None, None
        raise DataError(READ_ONCE)  # or this would go on for ever

    def state_dict(self) -> dict[str, Any]:
        last = self._last or ("" if self._held is None else _hash(self._held))
        first = self._rows is not None
        return {"begun": self._begun, "place": self._place, "last": last, "new": self.new, "first pass": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun, self._place, self._last = state["begun"], state["place"], state["last"]
        self.new, self._rows = state["new"], set() if state["first pass"] else None
        self._items, self._looking = None, True

    def _begin(self) -> None:
        random = RandomState()
        self._begun, self._place = {"random": random.state_dict(), "own": self._own()}, 0
        self._items = iter(self.batches)

    def _go_on(self) -> None:
        self._looking = False
        if self._begun is None:
            return
        random = RandomState()
        now = random.state_dict()
        random.load_state_dict(self._begun["random"])
        for generator, own in zip(self._generators, self._begun["own"], strict=False):
            generator.set_state(own)
        self._items = iter(self.batches)
        self._held = None
        for _ in range(self._place):
            self._held = next(self._items, None)
            if self._held is not None:
                self._remember(self._held, counted=False)
        if self._place and (self._held is None or _hash(self._held) != self._last):
            raise ResumeError(
                "the data doesn't come in the order that it came in before, so the run can't go on from there. Give it "
                "an order that a seed decides, or begin anew with resume='never'."
            )
        random.load_state_dict(now)

    def _remember(self, batch: Batch, counted: bool) -> None:
        if self._rows is None:
            return
        rows = _rows_of(batch)
        if counted and rows:
            self.new += len(set(rows) - self._rows) / len(rows)
        if len(self._rows) < _MOST_ROWS:
            self._rows.update(rows)

    @property
    def _generators(self) -> list[torch.Generator]:
        return generators_of(getattr(self.batches, "data", self.batches))

    def _own(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]


def _rows_of(batch: Batch) -> list[str]:
    """A hash of each row of the inputs, of values at even distances where a row has many."""
    tensors = [x.detach() for x in batch[1].values() if x.ndim and x.numel()]
    if not tensors:
        return []
    count = len(max(tensors, key=torch.numel))  # what has fewer values may number the steps
    values = [x.reshape(count, -1) for x in tensors if len(x) == count]
    looked_at = [x[:, :: -(-x.shape[1] // _MOST_VALUES)].cpu() for x in values]
    return [hash_of(x[k] for x in looked_at) for k in range(count)]


def generators_of(data: Any) -> list[torch.Generator]:
    """Those that a DataLoader, or what it samples by, was given to draw from."""
    sampler, batches = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    found = [getattr(own, "generator", None) for own in (data, sampler, batches, getattr(batches, "sampler", None))]
    return list({id(own): own for own in found if isinstance(own, torch.Generator)}.values())


def check_same(batch: Batch) -> None:
    """Raises RankError where ranks were given other batches, or in another order: see `ranks.same`."""
    ranks.same(lambda: {"the batches, or their order": _hash(batch)})


def _hash(batch: Batch) -> str:
    return hash_of(batch[1].values())


def hash_of(tensors: Iterable[torch.Tensor]) -> str:
    """Of shapes, dtypes and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
