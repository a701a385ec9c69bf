"""Batches pass after pass, and from a place that is found again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from thesean.distill.stream import Stream, hash_of
from thesean.errors import DataError, ResumeError

ROWS = torch.arange(12.0).unsqueeze(1)


class Drawn:
    """Six batches in an order that is drawn anew each pass, `by` whom is asked."""

    def __init__(self, by: str) -> None:
        self.by = by

    def __iter__(self) -> Iterator[Any]:
        order = {
            "torch": lambda: torch.randperm(6).tolist(),
            "python": lambda: random.sample(range(6), 6),
            "numpy": lambda: np.random.permutation(6).tolist(),  # noqa: NPY002
            "nobody": lambda: list(range(6)),
        }[self.by]()
        return iter([(k, {"x": ROWS[k : k + 1]}) for k in order])


class Loaded:
    def __init__(self, loader: DataLoader[Any]) -> None:
        self.data = loader

    def __iter__(self) -> Iterator[Any]:
        return ((int(x), {"x": x}) for (x,) in self.data)


def loader(seed: int, sampled: bool = False) -> Loaded:
    generator = torch.Generator().manual_seed(seed)
    if sampled:
        sampler = RandomSampler(ROWS[:6], generator=generator)
        return Loaded(DataLoader(TensorDataset(ROWS[:6]), batch_size=1, sampler=sampler))
    return Loaded(DataLoader(TensorDataset(ROWS[:6]), batch_size=1, shuffle=True, generator=generator))


def read(stream: Stream, count: int) -> list[int]:
    return [next(stream)[0] for _ in range(count)]


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@pytest.mark.parametrize("count", [0, 1, 4, 7])
@pytest.mark.parametrize("by", ["torch", "python", "numpy", "nobody", "a generator", "its sampler"])
def test_a_stream_goes_on_where_it_was_though_its_order_is_drawn(by, count):
    def batches(seed: int) -> Any:
        return loader(seed, by == "its sampler") if by in ("a generator", "its sampler") else Drawn(by)

    seeded(0)
    stream = Stream(batches(0))
    read(stream, count)
    state = stream.state_dict()
    rest = read(stream, -count % 6)
    seeded(5)
    again = Stream(batches(5))
    again.load_state_dict(state)
    before = torch.get_rng_state()
    assert read(again, -count % 6) == rest
    assert torch.equal(torch.get_rng_state(), before)  # looking for the place draws nothing from whoever trains


def test_each_pass_has_every_batch_once():
    seeded(0)
    stream = Stream(Drawn("torch"))
    passes = [read(stream, 6) for _ in range(3)]
    assert [sorted(p) for p in passes] == [list(range(6))] * 3
    assert passes[0] != passes[1]
    assert read(Stream([(7, {"x": ROWS})]), 3) == [7, 7, 7]


def test_data_in_another_order_than_before_is_refused():
    stream = Stream(Drawn("nobody"))
    read(stream, 3)
    for other in ([(k, {"x": ROWS[k : k + 1] + 1}) for k in range(6)], [(0, {"x": ROWS[:1]})]):
        again = Stream(other)
        again.load_state_dict(stream.state_dict())
        with pytest.raises(ResumeError, match="doesn't come in the order"):
            next(again)
    same_place = Stream([(9, {"x": ROWS[2:3]})] * 3)
    same_place.load_state_dict(stream.state_dict())
    assert next(same_place)[0] == 9  # what was read last is what is looked at; then a pass begins


def test_a_state_can_be_kept_again_before_anything_was_read():
    stream = Stream(Drawn("nobody"))
    read(stream, 2)
    again = Stream(Drawn("nobody"))
    again.load_state_dict(stream.state_dict())
    third = Stream(Drawn("nobody"))
    third.load_state_dict(again.state_dict())
    assert read(third, 5) == [2, 3, 4, 5, 0]


@pytest.mark.parametrize("lives", [0, 1])
def test_data_that_gives_nothing_more_is_told(lives):
    class Mortal:
        left = lives

        def __iter__(self) -> Iterator[Any]:
            self.left -= 1
            return iter([(0, {"x": ROWS})] if self.left >= 0 else [])

    stream = Stream(Mortal())
    read(stream, lives)
    with pytest.raises(DataError, match="no batch when it was read again"):
        next(stream)


def test_batches_are_told_apart_by_shape_dtype_and_every_byte():
    x = torch.arange(6, dtype=torch.float32)
    others = [x.view(2, 3), x.view(torch.int32), x + torch.eye(6)[5], x.flip(0)]
    found = {hash_of([x]), *(hash_of([other]) for other in others), hash_of([x, x]), hash_of([])}
    assert len(found) == 7
    assert hash_of([x]) == hash_of([x.clone().requires_grad_()]) == hash_of([x.repeat(2)[:6]])


def test_what_is_new_is_counted_in_the_first_pass_and_where_it_goes_on():
    stream = Stream(Drawn("nobody"))
    read(stream, 4)
    assert stream.new == 4
    again = Stream(Drawn("nobody"))
    again.load_state_dict(stream.state_dict())
    for each in (stream, again):
        read(each, 2)
        assert each.new == 6
        read(each, 6)
        assert each.new == 6


def test_of_a_pass_that_says_the_same_again_what_is_new_is_counted_alone():
    class Twice:
        def __iter__(self) -> Iterator[Any]:
            return iter([(k, {"step": torch.arange(9), "x": ROWS[k % 3].expand(1, 10)}) for k in (0, 1, 0, 2, 1)])

    stream, counts = Stream(Twice()), []
    for _ in range(5):
        read(stream, 1)
        counts.append(stream.new)
    assert counts == [1, 2, 2, 3, 3]
    again = Stream(Twice())
    stream = Stream(Twice())
    read(stream, 2)
    again.load_state_dict(stream.state_dict())
    read(again, 3)
    assert again.new == 3


@pytest.mark.parametrize("x", [torch.zeros(4, 0), torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 9000).bfloat16()])
def test_rows_of_any_kind_are_told_apart_or_taken_for_one(x: torch.Tensor):
    stream = Stream([(0, {"x": x})])
    next(stream)
    assert stream.new == (0.25 if x.numel() else 0.0)
