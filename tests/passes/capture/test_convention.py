"""The guide's own nesting, and whether a graph gives the guide's numbers.

B batch, D width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests import captured
from tests.captured import traced
from tests.models import vectors
from thesean.errors import CaptureError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.convention import (
    check_same,
    first_shown,
    plain_calling_convention,
    same_outputs,
    tensors,
    thinned,
    void,
)

ONE, TWO, THREE, FOUR = (torch.full((2,), float(n)) for n in range(1, 5))


@dataclass
class Record:
    first: Any
    second: Any


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    "value",
    [
        (ONE, [TWO, {"x": THREE}], FOUR),
        {"b": ONE, "a": (TWO, None, THREE), "c": FOUR},
        Record(Record(ONE, [TWO]), Pair(THREE, FOUR)),
        [ONE, 7, "text", TWO, None, THREE, FOUR],
    ],
)
def test_tensors_are_told_in_the_order_in_which_they_are_nested(value):
    assert [float(x[0]) for x in tensors(value)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("value", "is_void"),
    [
        (torch.full((3,), torch.nan), True),
        ((torch.full((3,), torch.inf), torch.full((2,), torch.nan)), True),
        ((torch.full((3,), torch.nan), torch.tensor([torch.nan, 1.0])), False),
        ((torch.full((3,), torch.nan), torch.tensor([1])), True),
        (torch.tensor([1]), False),
        (torch.ones(0), False),
        ((), False),
    ],
)
def test_an_output_without_a_finite_number_is_void(value, is_void):
    assert void(value) == is_void


@pytest.mark.parametrize(("count", "most"), [(10, 10), (10, 4), (1000, 10), (7, 100), (0, 5)])
def test_numbers_are_taken_from_all_over_by_an_odd_step(count, most):
    found = thinned(torch.arange(count).view(-1, 1), most)
    steps = set(found.diff().tolist())
    assert len(steps) <= 1
    assert all(step % 2 for step in steps)
    assert len(found) <= count
    assert len(found) >= min(count, most / 2)
    assert found.tolist()[:1] == [0][:count]


def test_two_outputs_agree_but_for_rounding():
    x = torch.tensor([1.0, -1000.0, torch.nan, torch.inf])
    assert same_outputs(x, x * (1 + 5e-5))
    assert not same_outputs(x, x * (1 + 5e-4))
    assert not same_outputs(torch.zeros(2), torch.full((2,), 5e-5))
    assert same_outputs(torch.zeros(2), torch.full((2,), 5e-6))
    assert not same_outputs(torch.tensor([torch.nan]), torch.tensor([1.0]))
    assert not same_outputs(torch.ones(2), torch.ones(2, 1))
    assert not same_outputs((ONE, TWO), (ONE,))
    assert not same_outputs((ONE, TWO), (ONE, THREE))
    asked = torch.tensor([True, False])
    assert same_outputs(asked, asked.clone())
    assert not same_outputs(asked, ~asked)


@pytest.mark.parametrize(("dtype", "near", "far"), [(torch.float16, 2e-3, 2e-2), (torch.bfloat16, 2e-2, 2e-1)])
def test_half_precision_agrees_to_a_share_of_the_largest_number(dtype, near, far):
    x = torch.tensor([0.0, 100.0]).to(dtype)
    small = torch.tensor([1.0, 0.0])
    assert same_outputs(x, (x + 100 * near * small).to(dtype))
    assert not same_outputs(x, (x + 100 * far * small).to(dtype))
    assert same_outputs(torch.ones(0, dtype=dtype), torch.ones(0, dtype=dtype))


class Several(nn.Module):
    def forward(self, Xa: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
        return {"sum": Xa + b, "others": [(Xa, None), b > 0]}


def test_a_graph_is_called_as_the_guide_is_and_gives_its_nesting():
    x, b = vectors(2, 3), vectors(2, 3, seed=1)
    model = Several()
    graph_module = plain_calling_convention(traced(model, x, b), ["b", "Xa"], model(x, b))
    assert [n.name for n in graph_module.graph.find_nodes(op="placeholder")] == ["b", "Xa"]
    torch.testing.assert_close(graph_module(Xa=x, b=b), model(x, b))


def test_another_structure_than_the_graphs_is_refused():
    x, b = vectors(2, 3), vectors(2, 3, seed=1)
    for eager in (x, {"sum": x}):
        with pytest.raises(CaptureError, match=r"has a structure that can't be kept"):
            plain_calling_convention(traced(Several(), x, b), ["Xa", "b"], eager)
    with pytest.raises(CaptureError, match=r"returns a str; expected tensors in tuples, lists, dicts or dataclasses"):
        plain_calling_convention(traced(Several(), x, b), ["Xa", "b"], ("text", x))


class Asks(nn.Module):
    """x_BD -> y_BD, and whether it is above zero."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x > 0


def test_a_graph_that_gives_other_numbers_is_told_by_the_output_and_by_how_much():
    made = capture(Asks(), vectors(4, 8))

    def guide(inputs: dict[str, torch.Tensor]) -> Any:
        return Asks()(*inputs.values())

    check_same(made, guide)
    with pytest.raises(CaptureError, match=r"disagrees with the guide by 5\.0e-01 in output 0; is the guide random"):
        check_same(made, lambda inputs: (guide(inputs)[0] + 0.5, guide(inputs)[1]))
    with pytest.raises(CaptureError, match=r"disagrees with the guide by 1\.0e\+00 in output 1"):
        check_same(made, lambda inputs: (guide(inputs)[0], ~guide(inputs)[1]))
    with pytest.raises(CaptureError, match=r"gives \(\d+, 8\) where the guide gives \(\d+, 4\) in output 0"):
        check_same(made, lambda inputs: (guide(inputs)[0][:, :4], guide(inputs)[1]))


def test_the_guide_is_run_again_only_where_the_graph_is_not_what_was_shown():
    made = captured.mlp()
    x = next(iter(made.example.values()))
    right, calls = made.graph_module(x), []

    def guide(inputs: dict[str, torch.Tensor]) -> Any:
        calls.append(len(next(iter(inputs.values()))))
        return made.graph_module(**inputs)

    check_same(made, guide, first_shown(made, right))
    assert calls == []
    check_same(made, guide, first_shown(made, right + 1))
    assert calls == [2]
    assert first_shown(made, right.sum()) is None  # it has no row for each of the batch
    assert first_shown(made, (right, right[:1])) is None
