from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from thesean.distill.hold_out import hold_out
from thesean.errors import DataError

ROWS = torch.arange(96.0).unsqueeze(1)


def seen(batches):
    return sorted(float(v) for (x,) in batches for v in x.flatten())


@pytest.mark.parametrize(("count", "held"), [(1, 0), (3, 0), (4, 1), (8, 1), (16, 2), (100, 4)])
def test_the_last_batches_of_a_list_are_held_out(count, held):
    data, kept, told = hold_out(list(range(count)), 0)
    assert data == list(range(count - held))
    assert kept == (list(range(count - held, count)) if held else None)
    some = "last batch of data was" if held == 1 else f"last {held} batches of data were"
    assert ("measured on training batches" if not held else f"the {some} held out") in told


@pytest.mark.parametrize(("shuffle", "workers"), [(False, 0), (True, 0), (True, 1)])
def test_rows_of_a_loader_are_held_out_of_every_pass(shuffle, workers):
    loader = DataLoader(TensorDataset(ROWS), batch_size=6, shuffle=shuffle, num_workers=workers)
    data, held_out, told = hold_out(loader, 0)
    assert held_out is not None
    theirs = seen(held_out)
    assert len(theirs) == 12  # two of sixteen batches
    if not shuffle:
        assert theirs == seen([(ROWS[-12:],)])
    for _ in range(2):
        assert sorted(seen(data) + theirs) == seen([(ROWS,)])
    assert ("" if shuffle else "the last ") + "12 of data's 96 rows were held out" in told
    orders = [torch.cat([x for (x,) in data]) for _ in range(2)]
    assert torch.equal(*orders) is not shuffle


def test_a_loader_keeps_its_ways():
    loader = DataLoader(
        TensorDataset(ROWS), batch_size=6, shuffle=True, drop_last=True, collate_fn=lambda rows: len(rows),
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    data, held_out, _ = hold_out(loader, 0)
    assert set(data) == {6}
    assert list(held_out or ()) == [6, 6]
    assert isinstance(data, DataLoader)
    assert data.generator is loader.generator


def test_workers_of_a_loader_are_started_as_it_says():
    def started(_: int) -> None: ...

    ways = {
        "num_workers": 1, "pin_memory": True, "timeout": 3, "worker_init_fn": started, "prefetch_factor": 5,
        "persistent_workers": True,
    }  # fmt: skip
    loader = DataLoader(TensorDataset(ROWS), batch_size=6, multiprocessing_context="spawn", **ways)  # type: ignore[arg-type]
    data, held_out, _ = hold_out(loader, 0)
    for mine in (data, held_out):
        assert {name: getattr(mine, name) for name in ways} == ways
        assert isinstance(mine, DataLoader)
        assert mine.multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.parametrize("lives", [1, 2])
def test_what_can_not_be_read_again_is_refused(lives):
    class Mortal:
        left = lives

        def __iter__(self):
            self.left -= 1
            return iter([(ROWS,)] * 8 if self.left >= 0 else [])

    with pytest.raises(DataError, match="data gave no batch when it was read again"):
        hold_out(Mortal(), 0)


class Stream(IterableDataset):
    """Always the same rows, in the same order."""

    def __iter__(self):
        return iter(ROWS)


class Shuffled:
    def __iter__(self):
        return iter([(x,) for x in ROWS[torch.randperm(96)].split(6)])


def test_the_first_batches_of_what_comes_in_one_order_are_held_out():
    batched = DataLoader(TensorDataset(ROWS), batch_sampler=BatchSampler(SequentialSampler(ROWS), 6, False))
    for loader in (batched, DataLoader(Stream(), batch_size=6)):
        data, held_out, told = hold_out(loader, 0)
        assert held_out is not None
        assert "the first 2 batches of data were held out" in told
        both = [
            torch.cat([b[0] if isinstance(b, list) else b for b in batches]).flatten() for batches in (held_out, data)
        ]
        assert torch.equal(torch.cat(both), ROWS.flatten())


def test_what_comes_in_another_order_each_time_can_not_be_divided():
    data, held_out, told = hold_out(given := Shuffled(), 0)
    assert (data, held_out) == (given, None)
    assert "measured on training batches, which come in another order each time" in told


def test_an_endless_stream_is_read_no_further_than_needed():
    class Endless:
        def __iter__(self):
            return iter(int, 1)

    data, held_out, _ = hold_out(Endless(), 0)
    assert held_out == [0, 0, 0, 0]
    assert next(iter(data)) == 0
