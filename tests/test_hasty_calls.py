"""What a hurried caller gives is told before or while it is read; `python -m benchmarks hostile` has all of it.

B batch, T time, D width
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import thesean
from benchmarks.hostility.guides import POSITIONS, WORDS, Blocks, Words, compiled, ids, seeded, vectors
from thesean.errors import DataError, NumericalError, TheseanError


def with_last(value: torch.Tensor, number: int) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[-1] = number
    return value


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"data": [*ids(3), with_last(ids(1)[0], WORDS), *ids(6)]}, rf"data, batch 3: .*ids holds {WORDS}; expected"),
        ({"data": [*ids(8), with_last(ids(1)[0], -1)]}, r"data, batch 8: .*ids holds -1; expected ids from 0"),
        (
            {"data": [*ids(8), *ids(1, time=POSITIONS + 1)]},
            rf"data, batch 8: .*time {POSITIONS + 1}, where the example",
        ),
        ({"eval_data": [with_last(ids(1)[0], WORDS)]}, rf"eval_data, batch 0: .*ids holds {WORDS}"),
        ({"data": [*ids(8), ids(1)[0][:0]]}, r"batch 8: 'ids' is empty, of shape \(0, 6\)"),
    ],
)
def test_a_batch_that_the_guide_does_not_run_on_is_named(arguments, told):
    with pytest.raises(DataError, match=told):
        compiled(seeded(Words), **{"data": ids(), **arguments})


def test_ids_past_the_table_are_told_at_the_call():
    converted = compiled(seeded(Words), data=ids())
    for number in (WORDS, -1):
        with pytest.raises(DataError, match=rf"ids holds {number}; expected ids from 0 to {WORDS - 1}"):
            converted(with_last(ids(1)[0], number))


class Once:
    def __init__(self) -> None:
        self.left = iter(vectors())

    def __iter__(self) -> Any:
        return self.left


def test_data_that_can_be_read_once_is_refused():
    with pytest.raises(DataError, match="gave no batch when it was read again"):
        compiled(data=Once())


class Endless:
    def __iter__(self) -> Any:
        return itertools.cycle(vectors())


def test_eval_data_without_an_end_is_measured_on_its_first_batches(monkeypatch):
    monkeypatch.setattr("thesean.distill.data._MOST_HELD", 5)
    with pytest.warns(UserWarning, match=r"eval_data has no len\(\) and did not end: measured on its first 5 batches"):
        converted = compiled(eval_data=Endless())
    assert any("first 5 batches" in note for note in converted.report.notes)


def test_a_network_whose_outputs_are_nan_is_refused():
    class Broken(torch.nn.Module):
        def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
            return x_BTD * float("nan")

    with pytest.raises(NumericalError, match="outputs on held-out batches are not finite"):
        compiled(None, thesean.Target("mine", build=lambda part: Broken()))


@pytest.mark.parametrize("seed", ["1", 1.5, None, True, 2**63])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(TheseanError, match="seed: expected a whole number"):
        compiled(seed=seed)


def test_inference_mode_around_the_call_gives_a_network_that_can_be_trained(tmp_path):
    guide, data = seeded(Blocks), vectors()
    with torch.inference_mode():
        converted = thesean.compile(guide, "narrow", data=data, recipe={"steps": 2}, progress=False)
        loaded = thesean.load(converted.save(tmp_path / "saved"))
    for found in (converted, loaded):
        found(data[0]).square().mean().backward()
        assert all(p.grad is not None for p in found.module.part_0.parameters())


def test_the_default_dtype_of_the_process_changes_no_number():
    guide, data = seeded(Blocks), vectors()
    usual = compiled(guide, data=data)(data[0])
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(compiled(guide, data=data)(data[0]), usual)
    finally:
        torch.set_default_dtype(torch.float32)
