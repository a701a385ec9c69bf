"""In chunks and at once, on graphs that are written by hand.

B batch, T time, D width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from thesean.passes.analyse.chunks import (
    RELATES,
    Difference,
    cut,
    is_close,
    join,
    run_in_chunks,
    same_in_chunks,
    split_inputs,
)
from thesean.passes.graph.signature import InputSpec, Signature

aten = torch.ops.aten
TIME, CHUNKS = 7, (3, 1, 3)

Call = Callable[..., Any]
Made = Callable[[Call, Any, Any], tuple[Any, Any]]


def spec(name: str, *shape: int | str) -> InputSpec:
    return InputSpec(name=name, dtype=torch.float32, shape=shape)


SIGNATURE = Signature(inputs=(spec("x", "batch", "time", 2),))


@pytest.mark.parametrize(
    ("length", "first", "chunks"),
    [
        (7, (3,), (3, 4)),
        (7, (3, 3), (3, 3, 1)),
        (7, (3, 4), (3, 4)),
        (7, (3, 9), (3, 4)),
        (7, (9, 1), (7,)),
        (7, (), (7,)),
        (1, (1, 1), (1,)),
    ],
)
def test_a_length_is_cut_into_the_chunks_that_are_asked_for_and_the_rest(length, first, chunks):
    assert cut(length, first) == chunks


def test_inputs_are_cut_along_time_and_others_are_whole_in_each_chunk():
    held = replace(spec("held", "batch", "time", 2), held=True)
    signature = Signature(inputs=(*SIGNATURE.inputs, spec("late", "batch", 2, "time"), spec("once", "batch", 2), held))
    inputs = {
        "x": torch.randn(2, TIME, 2), "late": torch.randn(2, 2, TIME),
        "once": torch.randn(2, 2), "held": torch.randn(2, TIME, 2),
    }  # fmt: skip
    pieces = split_inputs(signature, inputs, CHUNKS)
    assert [piece["x"].shape[1] for piece in pieces] == [piece["late"].shape[2] for piece in pieces] == list(CHUNKS)
    torch.testing.assert_close(torch.cat([piece["x"] for piece in pieces], 1), inputs["x"])
    torch.testing.assert_close(torch.cat([piece["late"] for piece in pieces], 2), inputs["late"])
    assert all(piece[name] is inputs[name] for piece in pieces for name in ("once", "held"))


def rows(*sizes: int) -> list[torch.Tensor]:
    return [torch.full((1, size, 2), float(size)) for size in sizes]


def test_parts_are_joined_where_they_differ_from_the_whole():
    torch.testing.assert_close(join(rows(3, 4), torch.Size([1, 7, 2])), torch.cat(rows(3, 4), 1))
    torch.testing.assert_close(join(rows(3, 4), torch.Size([1, 6, 2]), delay=1), torch.cat(rows(3, 4), 1))
    kept = rows(3, 5, 7)
    assert join(kept, torch.Size([1, 7, 2])) is kept[-1]  # what grows with the sequence
    assert join([rows(3)[0], torch.ones(1, 4)], torch.Size([1, 7, 2])) == "its rank depends on the length"
    for shape, why in {
        (1, 7): "its rank depends on the length",
        (1, 7, 7): "shape (1, 7, 7) relates steps with each other",
        (1, 8, 2): "shape (1, 8, 2) is not the chunks' in a row",
        (1, 6, 2): "shape (1, 6, 2) is not the chunks' in a row",
    }.items():
        assert join(rows(3, 4), torch.Size(shape)) == why


def threaded(made: Made) -> fx.GraphModule:
    """y_BTD and the state that follows, made of x_BTD and state_BD."""
    graph = fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("state")
    graph.output(made(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), x, state))
    return fx.GraphModule(nn.Module(), graph)


def summed(c: Call, x: Any, state: Any) -> tuple[Any, Any]:
    within, before = c(aten.cumsum.default, x, 1), c(aten.unsqueeze.default, state, 1)
    for node in (within, before):
        node.meta[RELATES] = True
    y = c(aten.add.Tensor, within, before)
    return y, c(aten.select.int, y, 1, -1)


# of what is made of x alone: where it differs first, and how
WITHOUT: dict[str, tuple[Callable[[Call, Any], Any], str, str]] = {
    "a sum so far": (lambda c, x: c(aten.exp.default, c(aten.cumsum.default, x, 1)), "cumsum", "step by step it diff"),
    "a sum": (lambda c, x: c(aten.add.Tensor, x, c(aten.sum.dim_IntList, x, [1], True)), "sum_dim", "step by step it"),
    "scores": (
        lambda c, x: c(aten.matmul.default, c(aten.matmul.default, x, c(aten.transpose.int, x, 1, 2)), x),
        "matmul_default",
        "relates steps with each other",
    ),
    "a step that short chunks don't have": (
        lambda c, x: c(aten.add.Tensor, x, c(aten.select.int, x, 1, 2)),
        "select_int",
        "it needs other steps than its chunk's",
    ),
    "a mask that short chunks don't have, where a hidden state meets it": (
        lambda c, x: c(aten.mul.Tensor, x, c(aten.select.int, c(aten.lt.Scalar, x, 0), 1, 2)),
        "mul_tensor",
        "it needs other steps than its chunk's",
    ),
    "a mask that nothing meets": (
        lambda c, x: c(aten.logical_not.default, c(aten.select.int, c(aten.lt.Scalar, x, 0), 1, 2)),
        "select_int",
        "it needs other steps than its chunk's",
    ),
    "a shift": (
        lambda c, x: c(aten.slice.Tensor, c(aten.pad.default, x, [0, 0, 1, 0]), 1, 0, -1),
        "pad",
        "is not the chunks' in a row",
    ),
}


def without_state(made: Callable[[Call, Any], Any]) -> fx.GraphModule:
    return threaded(lambda c, x, state: (made(c, x), state))


def given() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(1, TIME, 2, generator=generator)}, {"state": torch.zeros(1, 2)}


def test_what_a_state_carries_on_is_the_same_in_chunks():
    inputs, states = given()
    graph_module = threaded(summed)
    assert same_in_chunks(graph_module, SIGNATURE, inputs, states, CHUNKS) is None
    outputs, after = run_in_chunks(graph_module, SIGNATURE, inputs, states, CHUNKS)
    torch.testing.assert_close(torch.cat([y for (y,) in outputs], 1), inputs["x"].cumsum(1))
    torch.testing.assert_close(after["state"], inputs["x"].sum(1))


def test_token_wise_ones_are_the_same_in_chunks():
    inputs, states = given()
    graph_module = without_state(lambda c, x: c(aten.sum.dim_IntList, c(aten.exp.default, x), [2], True))
    assert same_in_chunks(graph_module, SIGNATURE, inputs, states, CHUNKS) is None


@pytest.mark.parametrize("name", WITHOUT)
def test_the_first_node_that_needs_other_steps_is_told(name):
    made, node, what = WITHOUT[name]
    found = same_in_chunks(without_state(made), SIGNATURE, *given(), CHUNKS)
    assert isinstance(found, Difference)
    assert found.node.startswith(node)
    assert what in found.what


def test_what_does_not_run_at_all_is_told():
    found = same_in_chunks(without_state(lambda c, x: c(aten.select.int, x, 1, TIME)), SIGNATURE, *given(), CHUNKS)
    assert found == Difference(node="select_int", what="one row alone does not run")


def test_close_is_the_same_shape_and_the_same_numbers_but_for_rounding():
    want = torch.tensor([1.0, 100.0])
    assert is_close(want + 5e-3, want)
    assert not is_close(want + 1.05e-2, want)  # one in ten thousand of the largest
    assert not is_close(want[:1], want)
    assert not is_close("another shape", want)
    small = torch.tensor([0.0, 1e-3])
    assert is_close(small + 5e-5, small)
    assert not is_close(small + 5e-4, small)
    for dtype, near, far in ((torch.float16, 5e-3, 5e-2), (torch.bfloat16, 3e-2, 2e-1)):
        one = torch.ones(2, dtype=dtype)
        assert is_close(one + near, one)
        assert not is_close(one + far, one)
