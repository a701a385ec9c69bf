"""Whose values and whose lengths come together where, and what crosses between two halves.

B batch, T time, S steps of a source, D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.analyse.crossing import crossings
from thesean.passes.analyse.entered import ROWS, Entered, what_enters
from thesean.passes.graph.signature import Bound, InputSpec, Signature

aten = torch.ops.aten

Call = Callable[..., Any]
Made = Callable[[Call, Any, Any], Any]


def spec(name: str, *shape: int | str) -> InputSpec:
    return InputSpec(name=name, dtype=torch.float32, shape=shape)


SIGNATURE = Signature(inputs=(spec("text", "batch", "time", 4), spec("source", "batch", "source_time", 4)))


def read(made: Made, signature: Signature = SIGNATURE) -> tuple[Entered, Any]:
    """What enters the nodes of what is made of text_BTD and source_BSD, and those nodes."""
    graph = fx.Graph()
    text, source = graph.placeholder("text"), graph.placeholder("source")
    value = made(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), text, source)
    graph.output(value)
    return what_enters(fx.GraphModule(nn.Module(), graph), signature), value


def size(c: Call, x: Any, dim: int) -> Any:
    return c(aten.sym_size.int, x, dim)


def test_values_and_lengths_are_told_apart():
    def made(c: Call, text: Any, source: Any) -> tuple[Any, ...]:
        both = c(aten.matmul.default, text, c(aten.transpose.int, source, 1, 2))
        places = c(aten.arange.default, size(c, text, 1))
        return both, places, c(aten.mul.Tensor, source, size(c, text, 1)), c(aten.ones.default, [size(c, source, 0)])

    entered, (both, places, scaled, rows) = read(made)
    told = [(set(entered.values[n]), set(entered.sizes[n])) for n in (both, places, scaled, rows)]
    assert told == [({"text", "source"}, set()), (set(), {"time"}), ({"source"}, {"time"}), (set(), set())]
    assert entered.shape(both) == (ROWS, entered.pairs["time"], entered.pairs["source_time"])
    assert (entered.is_tensor(both), entered.is_tensor(rows)) == (True, True)


def test_a_size_that_is_no_inputs_length_comes_of_all_that_its_tensor_is_made_of():
    def made(c: Call, text: Any, source: Any) -> tuple[Any, ...]:
        joined = c(aten.cat.default, [text, source], 1)
        kept = c(aten.slice.Tensor, source, 1, 2, 2**62)
        scores = c(aten.matmul.default, text, c(aten.transpose.int, source, 1, 2))
        return size(c, joined, 1), size(c, kept, 1), size(c, kept, 2), size(c, joined, 0), size(c, scores, 1)

    entered, (joined, kept, width, rows, steps) = read(made)
    assert entered.sizes[joined] == {"time", "source_time"}
    assert entered.sizes[kept] == entered.sizes[width] == {"source_time"}
    assert entered.sizes[rows] == frozenset()
    assert entered.sizes[steps] == {"time"}  # whatever else its tensor is made of
    assert [entered.values[n] for n in (joined, kept, width, rows)] == [frozenset()] * 4
    one, other = entered.number(joined) or (0, 0)
    assert (one, other) == tuple(sum(entered.pairs[n][at] for n in ("time", "source_time")) for at in (0, 1))
    assert entered.length_of((one, other)) is None
    assert entered.length_of(entered.pairs["time"]) == "time"
    assert entered.length_of(ROWS) is None
    assert not entered.is_tensor(joined)


def test_a_tensor_is_no_number():
    entered, value = read(lambda c, text, source: c(aten.exp.default, text))
    assert entered.number(value) is None


def test_no_two_lengths_are_alike_in_either_run():
    signature = Signature(inputs=(spec("text", "batch", "a", "b", "c"), spec("source", "batch", "d", "e", 4)))
    entered, _ = read(lambda c, text, source: c(aten.exp.default, text), signature)
    assert entered.pairs["batch"] == ROWS
    for at in (0, 1):
        assert len({pair[at] for pair in entered.pairs.values()}) == 6
    assert all(one != other for one, other in entered.pairs.values())


@pytest.mark.parametrize(
    ("made", "signature", "reason"),
    [
        (
            lambda c, text, source: c(aten.matmul.default, text, source),
            SIGNATURE,
            r"the network does not run at the sizes batch \(2, 3\), time \(\d+, \d+\), source_time",
        ),
        (
            lambda c, text, source: c(aten.select.int, text, 1, 20),
            SIGNATURE,
            "the network does not run at the sizes",
        ),
        (
            lambda c, text, source: text,
            Signature(inputs=(spec("text", "batch", *"abc"), spec("source", "batch", *"def"))),
            "expected at most 5 lengths, found batch, a, b, c, d, e, f",
        ),
        (
            lambda c, text, source: text,
            Signature(inputs=SIGNATURE.inputs, bounds=(Bound(name="time", least=4, most=4),)),
            "time is 4 alone: nothing tells what else is as long",
        ),
    ],
)
def test_a_network_that_two_sizes_do_not_tell_is_refused(made, signature, reason):
    with pytest.raises(PassRefused, match=reason):
        read(made, signature)


# what crosses, and the shape of the decoder's input
CROSSING: dict[str, tuple[Made, tuple[int | str, ...]]] = {
    "as it is": (lambda c, text, source: c(aten.exp.default, source), ("batch", "source", 4)),
    "steps first": (lambda c, text, source: c(aten.transpose.int, source, 0, 1), ("batch", "source", 4)),
    "rows behind": (lambda c, text, source: c(aten.permute.default, source, [1, 2, 0]), ("batch", 4, "source")),
    "rows and heads in one": (
        lambda c, text, source: c(
            aten.flatten.using_ints, c(aten.transpose.int, c(aten.unflatten.int, source, 2, [2, 2]), 1, 2), 0, 1
        ),
        ("batch", 2, "source", 2),
    ),
    "summed up": (lambda c, text, source: c(aten.sum.dim_IntList, source, [1]), ("batch", 4)),
}


@pytest.mark.parametrize("name", CROSSING)
def test_what_crosses_has_its_batch_in_front_and_comes_back(name):
    made, shape = CROSSING[name]
    entered, value = read(made)
    (crossing,) = crossings([value], entered, SIGNATURE)
    assert (crossing.spec.name, crossing.spec.shape, crossing.spec.held) == ("encoded_0", shape, True)
    assert crossing.shape[0] == ROWS
    node = entered.runs[0][value]
    crossed = node if crossing.there is None else crossing.there(node)
    assert tuple(crossed.shape) == tuple(pair[0] for pair in crossing.shape)
    assert torch.equal(crossed if crossing.back is None else crossing.back(crossed), node)
    assert crossing.spec.example is not None
    assert crossing.spec.example.ndim == len(shape)


def test_equal_lengths_have_one_name_and_names_that_are_taken_are_not_taken_twice():
    def made(c: Call, text: Any, source: Any) -> tuple[Any, ...]:
        return c(aten.exp.default, source), c(aten.slice.Tensor, source, 1, 2, 2**62), c(aten.neg.default, source)

    signature = Signature(inputs=(spec("text", "batch", "time", 4), spec("source", "batch", "source_time", 4)))
    entered, values = read(made, signature)
    found = crossings(values, entered, signature)
    assert [c.spec.shape[1] for c in found] == ["source", "source_1", "source"]
    taken = Signature(inputs=(*signature.inputs, spec("encoded_more", "batch")))
    assert [c.spec.name for c in crossings(values, entered, taken)] == ["_encoded_0", "_encoded_1", "_encoded_2"]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda c, text, source: c(aten.sum.default, source), r"dimension of the batch, found \(\)"),
        (lambda c, text, source: c(aten.select.int, source, 0, 1), r"dimension of the batch, found \(\?, 4\)"),
        (lambda c, text, source: size(c, source, 1), "expected a tensor to cross, found another kind of value"),
    ],
)
def test_what_has_no_batch_is_refused(made, reason):
    entered, value = read(made)
    with pytest.raises(PassRefused, match=reason):
        crossings([value], entered, SIGNATURE)
