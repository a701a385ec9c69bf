"""What a hurried caller gives is told before or while it is read; `python -m benchmarks hostile` has all of it.

B batch, T time, D width
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

import thesean
from benchmarks.hostility.guides import POSITIONS, WORDS, Blocks, Words, compiled, ids, seeded, vectors
from tests.models import gpt2, token_batches, tokens
from thesean.errors import DataError, ExportError, NumericalError, PlanError, TargetMismatchError, TheseanError
from thesean.report.report_json import read_report


@cache
def fast() -> thesean.Converted:
    """For those who only look at it."""
    return compiled(recipe="fast")


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


def test_a_sequence_without_a_step_is_told_and_a_batch_without_a_row_gives_none():
    converted = thesean.compile(gpt2(1), "gru", data=token_batches(), recipe="fast", progress=False)
    assert len(converted(tokens(0)).logits) == 0
    with pytest.raises(DataError, match=r"input_ids is empty, of shape \(4, 0\): the network does not run on that"):
        converted(tokens(4, 0))


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


class FirstTime:
    def __init__(self) -> None:
        self.seen = False

    def __call__(self, output: torch.Tensor, batch: torch.Tensor) -> float:
        self.seen, first = True, not self.seen
        return 0.0 if first else float("nan")


def later(value: float) -> Any:
    """A loss or a metric that is this number from its second batch on, and a mean before."""
    seen: list[Any] = []

    def found(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return output.square().mean() if batch is seen[0] else output.sum() * 0 + value

    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_on_the_guides_own_outputs_is_refused(value):
    held = vectors(3)
    with pytest.raises(
        NumericalError, match=rf"held-out batch 1: loss\(output, batch\) is {value} for the guide's own"
    ):
        compiled(eval_data=held, loss=later(value))
    with pytest.raises(NumericalError, match="held-out batch 1"):
        thesean.baseline(
            seeded(Blocks), "narrow", kind="scratch", data=vectors(), eval_data=held, loss=later(value), progress=False
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_told(value):
    with pytest.warns(UserWarning, match="it says nothing") as seen:
        converted = compiled(eval_data=vectors(3), metric=later(value))
    told = [
        f"the metric of {who} is {value} on held-out data: it says nothing"
        for who in ("the guide", "the converted network")
    ]
    assert [str(w.message) for w in seen] == told
    assert [f"warning: {each}" for each in told] == [n for n in converted.report.notes if "metric" in n]
    assert {w.filename for w in seen} == {compiled.__code__.co_filename}


def test_a_metric_of_the_converted_network_alone_is_told():
    with pytest.warns(UserWarning, match="the metric of the converted network is nan on held-out data"):
        converted = compiled(metric=FirstTime())
    assert converted.report.guide["metric"] == 0
    assert not any("metric of the guide" in note for note in converted.report.notes)


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


@pytest.mark.parametrize(
    ("x_BTD", "told"),
    [
        (vectors(1)[0].to("meta"), "x is on meta, the network on cpu"),
        (vectors(1)[0].to_sparse(), r"x: expected a dense tensor, found one of torch\.sparse_coo"),
    ],
)
def test_a_converted_network_says_what_it_is_not_called_with(x_BTD, told):
    with pytest.raises(DataError, match=told):
        fast()(x_BTD)


@pytest.mark.parametrize(
    "arguments",
    [{"contexts": ()}, {"contexts": (-1,)}, {"contexts": "64"}, {"batch": 0}, {"batch": "1"}, {"repeats": 0}],
)
def test_figures_are_of_whole_numbers_of_steps_rows_and_turns(arguments):
    with pytest.raises(DataError, match=rf"{next(iter(arguments))}: expected whole numbers of 1 or more"):
        fast().benchmark(**arguments)


@pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), float("inf"), "low", True])
def test_a_tolerance_is_a_number_above_zero(tolerance, tmp_path):
    with pytest.raises(ExportError, match="tolerance: expected a number above 0"):
        fast().export(tmp_path / "m.onnx", tolerance=tolerance)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_which_parts_it_has():
    plan = thesean.plan(seeded(Blocks), "narrow", example_inputs=vectors(1)[0])
    with pytest.raises(PlanError, match=r"no part matches 'none'.*blocks\.0"):
        plan.target_of("none")
    for glob in ("none", 3):
        with pytest.raises(PlanError, match=f"edit: no part matches '{glob}'"):
            plan.edit(glob, "keep")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((None, seeded(Blocks), vectors()), "expected a model, found NoneType"),
        ((seeded(Blocks), seeded(Blocks), None), "data raised TypeError"),
        (
            (seeded(Blocks), seeded(Blocks), [torch.zeros(4, 6, 9)]),
            r"batch 0: a model does not run on it at .*guides\.py",
        ),
    ],
)
def test_what_can_not_be_compared_is_told(arguments, told):
    with pytest.raises(DataError, match=told):
        thesean.compare(*arguments)


def test_a_target_is_named():
    with pytest.raises(TargetMismatchError, match="named by its family"):
        thesean.Target(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["a\0b", 7, b"x", ""])
def test_what_can_not_be_a_name_is_not_read(path):
    for read in (thesean.Plan.from_yaml, thesean.Recipe.from_yaml, read_report, thesean.load):
        with pytest.raises(TheseanError, match=r"can't read .*(holds a NUL|expected a path|name is empty)"):
            read(path)


def test_loading_draws_nothing_at_random(tmp_path):
    saved = fast().save(tmp_path / "saved")
    torch.manual_seed(3)
    thesean.load(saved)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_inputs_may_be_called_by_capitals(tmp_path):
    class Capital(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Blocks()

        def forward(self, X: torch.Tensor, Bias: torch.Tensor) -> torch.Tensor:
            return self.body(X) + Bias

    data = [{"X": x_BTD, "Bias": x_BTD[:, :1]} for x_BTD in vectors()]
    converted = compiled(seeded(Capital), data=data)
    assert [s.name for s in converted.signature.inputs] == ["X", "Bias"]
    loaded = thesean.load(converted.save(tmp_path / "saved"))
    assert torch.equal(loaded(**data[0]), converted(data[0]["X"], data[0]["Bias"]))
    assert converted.export(tmp_path / "m.onnx").inputs[:2] == ("X", "Bias")


def test_what_the_guide_draws_is_not_the_callers():
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Blocks()

        def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
            return self.body(x_BTD) + 0 * torch.rand_like(x_BTD)

    guide = seeded(Noisy)
    torch.manual_seed(3)
    thesean.plan(guide, "narrow", example_inputs=vectors(1)[0])
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
