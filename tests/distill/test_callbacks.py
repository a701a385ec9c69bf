"""Functions and iterables of the caller's: what they raise or return is told as the argument that they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thesean
from tests import models
from thesean.distill.callbacks import checked_loss, checked_metric, checked_reader, each_of
from thesean.errors import DataError, NumericalError
from thesean.passes.graph.modes import usual_settings

OUTPUT = torch.ones(2, 3)


def giving(value: Any) -> Any:
    return lambda output, batch: value


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.ones(3), r"a tensor of shape \(3,\); expected a real scalar"),
        (torch.ones(()) * 1j, "complex numbers"),
        (None, "NoneType"),
        ((OUTPUT.mean(), 1), "tuple"),
        ("0.5", "str"),
    ],
)
def test_what_is_no_loss_is_told(value, found):
    loss = checked_loss(giving(value))
    assert loss is not None
    with pytest.raises(DataError, match=rf"loss\(output, batch\) returned {found}"):
        loss(OUTPUT, None)


@pytest.mark.parametrize("value", [OUTPUT.mean(), OUTPUT.mean().reshape(1), 0.5, 1])
def test_a_loss_comes_back_as_it_is(value):
    loss = checked_loss(giving(value))
    assert loss is not None
    assert loss(OUTPUT, None) is value


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("high", "'high'"),
        (None, "None"),
        ([1.0], r"\[1.0\]"),
        (1j, "1j"),
        (OUTPUT, r"a tensor of shape \(2, 3\)"),
        (OUTPUT[:0], r"a tensor of shape \(0, 3\)"),
        (torch.tensor(1j), "complex numbers"),
    ],
)
def test_what_is_no_metric_is_told(value, found):
    metric = checked_metric(giving(value))
    assert metric is not None
    with pytest.raises(DataError, match=rf"metric\(output, batch\) returned {found}; expected a number"):
        metric(OUTPUT, None)


def test_a_metric_that_no_float_holds_is_told():
    metric = checked_metric(giving(10**400))
    assert metric is not None
    with pytest.raises(DataError, match=r"metric\(output, batch\) raised OverflowError"):
        metric(OUTPUT, None)


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([0.5]), 0.5, True])
def test_a_metric_is_a_number(value):
    metric = checked_metric(giving(value))
    assert metric is not None
    assert metric(OUTPUT, None) == float(value)


def test_what_is_not_given_is_not_checked():
    assert checked_loss(None) is None
    assert checked_metric(None) is None
    assert checked_reader("inputs", None) is None


def failing(*_: Any) -> Any:
    return {}["y"]


def test_what_the_callers_code_raises_names_argument_and_line():
    loss, metric, read = checked_loss(failing), checked_metric(failing), checked_reader("labels", failing)
    assert loss is not None
    assert metric is not None
    assert read is not None
    place = r"raised KeyError: 'y' at .*test_callbacks\.py, line \d+, in failing: return"
    with pytest.raises(DataError, match=rf"loss\(output, batch\) {place}") as told:
        loss(OUTPUT, None)
    assert isinstance(told.value.__cause__, KeyError)
    with pytest.raises(DataError, match=rf"metric\(output, batch\) {place}"):
        metric(OUTPUT, None)
    with pytest.raises(DataError, match=rf"labels\(batch\), given NoneType, {place}"):
        read(None)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"ids": 1, "mask": 2}, "a dict of 'ids', 'mask'"),
        ({}, "a dict of nothing"),
        ((1, "a"), r"a tuple of 2 \(int, str\)"),
        ([0.5] * 9, rf"a list of 9 \({', '.join(['float'] * 8)}\)"),
        (OUTPUT, r"a tensor of shape \(2, 3\)"),
        (3, "int"),
    ],
)
def test_a_reader_that_fails_is_told_with_what_it_was_given(batch, told):
    read = checked_reader("inputs", failing)
    assert read is not None
    with pytest.raises(DataError, match=rf"^inputs\(batch\), given {told}, raised KeyError"):
        read(batch)
    fine = checked_reader("inputs", lambda batch: batch)
    assert fine is not None
    assert fine(batch) is batch


@pytest.mark.parametrize("error", [NumericalError("ours"), MemoryError(), KeyboardInterrupt()])
def test_our_own_errors_and_those_of_the_machine_pass(error):
    def raising(*_: Any) -> Any:
        raise error

    loss = checked_loss(raising)
    assert loss is not None
    with pytest.raises(type(error)):
        loss(OUTPUT, None)


def test_an_iterable_that_fails_names_the_batch():
    def batches() -> Any:
        yield from (1, 2)
        raise OSError("gone")

    found = each_of(batches(), "eval_data")
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(DataError, match=r"eval_data, batch 2: raised OSError: gone at .*test_callbacks\.py"):
        next(found)
    with pytest.raises(DataError, match="data raised TypeError"):
        list(each_of(3, "data"))


def test_the_callers_code_has_the_callers_default_dtype():
    seen = []

    def loss(output: Any, batch: Any) -> Any:
        seen.append(torch.get_default_dtype())
        return output.mean()

    checked = checked_loss(loss)
    assert checked is not None
    torch.set_default_dtype(torch.float64)
    try:
        with usual_settings():
            assert torch.get_default_dtype() == torch.float32
            checked(OUTPUT, None)
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    checked(OUTPUT, None)
    assert seen == [torch.float64, torch.float32]


def test_a_function_that_writes_into_the_output_is_told_and_leaves_no_figure_of_it():
    output = {"logits": torch.ones(2, 3)}
    for name, check in (("loss", checked_loss), ("metric", checked_metric)):
        function = check(lambda output, batch: output["logits"].mul_(2).mean())
        assert function is not None
        with pytest.raises(DataError, match=rf"{name}\(output, batch\) changes output in place"):
            function(output, None)
    own = checked_loss(lambda output, batch: output["logits"].clone().mul_(2).mean())
    assert own is not None
    assert own({"logits": torch.ones(2, 3)}, None) == 2.0


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        (0.9, r"loss\(output, batch\) changes input of its batch, which the guide reads"),
        # what stood there: told where a gradient needs it
        (1.0, r"changed in place: by loss\(output, batch\), which may not write"),
    ],
)
def test_a_loss_that_writes_into_its_batch_is_told(factor: float, told: str):
    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        batch.mul_(factor)
        return output.square().mean()

    data = [models.vectors(8, 8, seed=k) for k in range(4)]
    with pytest.raises(DataError, match=told):
        thesean.compile(models.mlp(), "mlp", data=data, loss=loss, recipe={"steps": 20}, progress=False)


def test_torchs_own_losses_are_told_what_they_are_given():
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(
        DataError, match=r"here Tensor and tuple: pick what it compares, .* or take thesean\.cross_entr"
    ):
        checked_loss(nn.CrossEntropyLoss())(torch.randn(4, 3), batch)  # type: ignore[misc]
    with pytest.raises(DataError, match=r"metric=lambda output, batch: f\(output, batch\[1\]\)"):
        checked_metric(F.l1_loss)(torch.randn(4, 3), batch)  # type: ignore[arg-type, misc]
