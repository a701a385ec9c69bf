"""Which operators mix the steps of a sequence, one at a time: x_BTD is what they are given.

B batch, T time, D width
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from thesean.passes.analyse.chunks import RELATES
from thesean.passes.analyse.steps_apart import constants_of_time, first_mixed
from thesean.passes.graph.record import record

aten = torch.ops.aten
END = 2**63 - 1  # of a slice, where a user writes none

Call = Callable[..., Any]
Made = Callable[[Call, Any], Any]


def written(made: Made) -> fx.GraphModule:
    """What is made of x_BTD."""
    root, graph = nn.Module(), fx.Graph()
    root.running_sum = RunningSum()
    x = graph.placeholder("x")
    graph.output(made(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), x))
    return fx.GraphModule(root, graph)


class RunningSum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


def runs(made: Made) -> tuple[fx.Graph, dict[Any, Any], dict[Any, Any]]:
    """The graph of what is made of x_BTD, and its values at 7 and at 5 steps."""
    graph_module = written(made)
    long, short = (record(graph_module, {"x": torch.ones(2, n, 4)}) for n in (7, 5))
    return graph_module.graph, dict(long), dict(short)


def time(call: Call, x: Any) -> Any:
    return call(aten.sym_size.int, x, 1)


def weight(call: Call, *shape: Any) -> Any:
    return call(aten.zeros.default, list(shape))


def other_way(call: Call, x: Any) -> Any:
    return call(aten.transpose.int, x, 1, 2)


def places(call: Call) -> Any:
    return call(aten.zeros.default, [3], dtype=torch.int64)


def marked(node: Any) -> Any:
    node.meta[RELATES] = True
    return node


def pairs(call: Call, x: Any) -> Any:
    """(B, T, T, D), the same for each of the first T."""
    return call(aten.expand.default, call(aten.unsqueeze.default, x, 1), [2, time(call, x), time(call, x), 4])


def square(call: Call) -> Any:
    return call(aten.sin.default, call(aten.view.default, call(aten.arange.start, 1, 17), [4, 4]))


def column(call: Call, x: Any) -> Any:
    return call(aten.select.int, call(aten.select.int, x, 2, 0), 0, 0)


def last(call: Call, x: Any) -> Any:
    return call(aten.slice.Tensor, x, 1, -1, END)


MIXING: dict[str, tuple[Made, str]] = {
    "softmax": (lambda c, x: c(aten.softmax.int, x, 1), "it works along time"),
    "softmax from the back": (lambda c, x: c(aten.softmax.int, x, -2), "it works along time"),
    "sum": (lambda c, x: c(aten.sum.dim_IntList, x, [2, 1]), "it works along time"),
    "sum of all": (lambda c, x: c(aten.sum.default, x), "it sums up the steps"),
    "flip": (lambda c, x: c(aten.flip.default, x, [1]), "it works along time"),
    "slice from": (lambda c, x: c(aten.slice.Tensor, x, 1, 2, END), "it cuts the sequence"),
    "slice to": (lambda c, x: c(aten.slice.Tensor, x, 1, 0, 3), "it cuts the sequence"),
    "slice to before the end": (lambda c, x: c(aten.slice.Tensor, x, 1, 0, -1), "it cuts the sequence"),
    "slice by two": (lambda c, x: c(aten.slice.Tensor, x, 1, 0, END, 2), "it cuts the sequence"),
    "slice to another size": (
        lambda c, x: c(aten.slice.Tensor, x, 1, 0, c(aten.sym_size.int, x, 2)), "it cuts the sequence"
    ),
    "select": (lambda c, x: c(aten.select.int, x, 1, 0), "it works along time"),
    "norm": (lambda c, x: c(aten.layer_norm.default, x, [time(c, x), 4]), "it is normalised over time"),
    "pad in front": (lambda c, x: c(aten.pad.default, x, [0, 0, 1, 0]), "it moves steps"),
    "pad behind": (lambda c, x: c(aten.constant_pad_nd.default, x, [0, 0, 0, 1]), "it moves steps"),
    "linear": (lambda c, x: c(aten.linear.default, other_way(c, x), weight(c, 3, time(c, x))), "it weighs steps"),
    "scores": (lambda c, x: c(aten.matmul.default, x, other_way(c, x)), "it relates steps with each other"),
    "scores by bmm": (lambda c, x: c(aten.bmm.default, x, other_way(c, x)), "it relates steps with each other"),
    "covariance": (lambda c, x: c(aten.matmul.default, other_way(c, x), x), "it sums over steps"),
    "weights times x": (lambda c, x: c(aten.matmul.default, weight(c, 3, time(c, x)), x), "it sums over steps"),
    "baddbmm": (
        lambda c, x: c(aten.baddbmm.default, weight(c, 2, 4, 4), other_way(c, x), x), "it sums over steps"
    ),
    "times the length": (lambda c, x: c(aten.mul.Tensor, x, time(c, x)), "it reads how long the sequence is"),
    "index_select": (lambda c, x: c(aten.index_select.default, x, 1, places(c)), "it picks steps"),
    "index": (lambda c, x: c(aten.index.Tensor, x, [None, places(c)]), "it picks steps"),
    "embedding": (lambda c, x: c(aten.embedding.default, c(aten.select.int, x, 0, 0), places(c)), "it picks steps"),
    "slice from, by names": (lambda c, x: c(aten.slice.Tensor, x, dim=1, start=2, end=END), "it cuts the sequence"),
    "slice to, by names": (lambda c, x: c(aten.slice.Tensor, x, dim=1, start=0, end=3), "it cuts the sequence"),
    "slice by two, by names": (lambda c, x: c(aten.slice.Tensor, x, dim=1, end=END, step=2), "it cuts the sequence"),
    "select, by names": (lambda c, x: c(aten.select.int, x, dim=1, index=3), "it works along time"),
    "pad, by names": (lambda c, x: c(aten.pad.default, x, pad=[0, 0, 2, 0]), "it moves steps"),
    "index, by names": (lambda c, x: c(aten.index.Tensor, x, indices=[None, places(c)]), "it picks steps"),
    "norm, by names": (
        lambda c, x: c(aten.layer_norm.default, x, normalized_shape=[time(c, x), 4]), "it is normalised over time"
    ),
    "pieces": (lambda c, x: c(aten.split.Tensor, x, 2, 1), "it works along time"),
    "norm of all of many": (
        lambda c, x: c(aten.layer_norm.default, pairs(c, x), [time(c, x), 4]), "it is normalised over time"
    ),
    "x times weights": (
        lambda c, x: c(aten.matmul.default, other_way(c, x), weight(c, time(c, x), 3)), "it sums over steps"
    ),
    "weights times a column": (
        lambda c, x: c(aten.matmul.default, weight(c, 3, time(c, x)), column(c, x)), "it sums over steps"
    ),
    "slice to as many as long ones have": (
        lambda c, x: c(aten.slice.Tensor, x, 1, 0, c(aten.sym_size.int, weight(c, 7), 0)), "it cuts the sequence"
    ),
    "slice to as many as short ones have": (
        lambda c, x: c(aten.slice.Tensor, x, 1, 0, c(aten.sym_size.int, weight(c, 5), 0)), "it cuts the sequence"
    ),
    "from the last to the third": (lambda c, x: c(aten.slice.Tensor, x, 1, -1, 3), "it cuts the sequence"),
    "the last but one": (lambda c, x: c(aten.select.int, x, 1, -2), "it works along time"),
    "from the last but one": (lambda c, x: c(aten.slice.Tensor, x, 1, -2, END), "it cuts the sequence"),
    "the last beside others": (lambda c, x: c(aten.add.Tensor, x, last(c, x)), "the last step meets the others"),
    "the last one's sum beside others": (
        lambda c, x: c(aten.add.Tensor, x, c(aten.sum.dim_IntList, last(c, x), [1], True)),
        "the last step meets the others",
    ),
    "the last, selected, beside others": (
        lambda c, x: c(aten.mul.Tensor, c(aten.transpose.int, x, 0, 1), c(aten.select.int, x, 1, -1)),
        "the last step meets the others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_steps_is_found_and_told(name):
    made, what = MIXING[name]
    graph, long, short = runs(made)
    found = first_mixed(graph, long, short)
    assert found is not None
    assert found.what == what
    assert found.node is graph.output_node().args[0]


APART: dict[str, Made] = {
    "softmax": lambda c, x: c(aten.softmax.int, x, 2),
    "softmax from the back": lambda c, x: c(aten.softmax.int, x, -1),
    "softmax of the other way": lambda c, x: c(aten.softmax.int, other_way(c, x), 1),
    "sum": lambda c, x: c(aten.sum.dim_IntList, x, [2, 0]),
    "flip": lambda c, x: c(aten.flip.default, x, [0, 2]),
    "slice of all": lambda c, x: c(aten.slice.Tensor, x, 1, 0, END),
    "slice of all, untold": lambda c, x: c(aten.slice.Tensor, x, 1),
    "slice to the length": lambda c, x: c(aten.slice.Tensor, x, 1, None, time(c, x)),
    "slice of the width": lambda c, x: c(aten.slice.Tensor, x, 2, 1, 3),
    "norm": lambda c, x: c(aten.layer_norm.default, x, [4]),
    "pad of the width": lambda c, x: c(aten.pad.default, x, [1, 1]),
    "pad by none": lambda c, x: c(aten.pad.default, x, [1, 0, 0, 0]),
    "linear": lambda c, x: c(aten.linear.default, x, weight(c, 3, 4)),
    "matmul": lambda c, x: c(aten.matmul.default, x, weight(c, 4, 3)),
    "matmul from the left": lambda c, x: c(aten.matmul.default, weight(c, 3, 4), other_way(c, x)),
    "views": lambda c, x: c(aten.transpose.int, c(aten.unsqueeze.default, x, 1), 1, 2),
    "stack": lambda c, x: c(aten.stack.default, [x, x], 1),
    "plus a number": lambda c, x: c(aten.add.Tensor, x, 3),
    "plus a size that stays": lambda c, x: c(aten.add.Tensor, x, c(aten.sym_size.int, x, 2)),
    "rows": lambda c, x: c(aten.index.Tensor, x, [places(c)]),
    "index_select of the width": lambda c, x: c(aten.index_select.default, x, 2, places(c)),
    "slice of all, by names": lambda c, x: c(aten.slice.Tensor, x, dim=1, start=0, end=END, step=1),
    "the last, by names": lambda c, x: c(aten.slice.Tensor, x, dim=1, start=-1, end=END),
    "the last, selected by names": lambda c, x: c(aten.select.int, x, dim=1, index=-1),
    "norm, by names": lambda c, x: c(aten.layer_norm.default, x, normalized_shape=[4]),
    "pad, by names": lambda c, x: c(aten.pad.default, x, pad=[1, 1]),
    "rows, by names": lambda c, x: c(aten.index.Tensor, x, indices=[places(c)]),
    "a table by values": lambda c, x: c(aten.embedding.default, weight(c, 9, 4), c(aten.argmax.default, x, 2)),
    "pieces of the width": lambda c, x: c(operator.getitem, c(aten.split.Tensor, x, 2, 2), 1),
    "norm of each of many": lambda c, x: c(aten.layer_norm.default, pairs(c, x), [4]),
    "zeros of its kind": lambda c, x: c(aten.new_zeros.default, x, [3]),
    "what relates steps and is known to": lambda c, x: marked(c(aten.cumsum.default, x, 1)),
    "the last": lambda c, x: last(c, x),
    "the last, selected": lambda c, x: c(aten.mul.Tensor, c(aten.select.int, x, 1, -1), 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_leaves_steps_apart_passes(name):
    assert first_mixed(*runs(APART[name])) is None


def test_modules_are_not_looked_into():
    def made(c: Call, x: Any) -> Any:
        return x.graph.call_module("running_sum", (x,))

    assert first_mixed(*runs(made)) is None


# what keeps (B, T, D), and whether a step of it is that step's alone
KEEPS: list[tuple[Made, bool]] = [
    (lambda c, x: c(aten.tanh.default, x), True),
    (lambda c, x: c(aten.add.Tensor, x, x), True),
    (lambda c, x: c(aten.softmax.int, x, 2), True),
    (lambda c, x: c(aten.flip.default, x, [-1]), True),
    (lambda c, x: c(aten.layer_norm.default, x, [4]), True),
    (lambda c, x: c(aten.linear.default, x, square(c)), True),
    (lambda c, x: c(aten.mul.Tensor, x, c(aten.sum.dim_IntList, x, [-1], True)), True),
    (lambda c, x: c(aten.pad.default, c(aten.slice.Tensor, x, 2, 1, END), [1, 0]), True),
    (lambda c, x: c(aten.slice.Tensor, x, 1, 0, time(c, x)), True),
    (lambda c, x: other_way(c, c(aten.matmul.default, square(c), other_way(c, x))), True),
    (lambda c, x: c(aten.transpose.int, c(aten.softmax.int, c(aten.transpose.int, x, 0, 1), 2), 0, 1), True),
    (lambda c, x: c(aten.cumsum.default, x, 1), False),
    (lambda c, x: c(aten.softmax.int, x, -2), False),
    (lambda c, x: c(aten.flip.default, x, [1]), False),
    (lambda c, x: c(aten.roll.default, x, [1], [1]), False),
    (lambda c, x: c(aten.add.Tensor, x, c(aten.select.int, c(aten.unsqueeze.default, x, 1), 2, -1)), False),
    (lambda c, x: other_way(c, c(aten.softmax.int, other_way(c, x), 2)), False),
    (lambda c, x: c(aten.matmul.default, c(aten.matmul.default, x, other_way(c, x)), x), False),
    (lambda c, x: c(aten.pad.default, c(aten.slice.Tensor, x, 1, 0, -1), [0, 0, 1, 0]), False),
    (lambda c, x: c(aten.sub.Tensor, x, c(aten.mean.dim, x, [1], True)), False),
    (lambda c, x: c(aten.mul.Tensor, x, time(c, x)), False),
]  # fmt: skip


def are_alone(made: Made) -> bool:
    """Whether steps give the same without those before and behind them."""
    network, x_BTD = written(made), torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    y_BTD, shorter_BTD = network(x_BTD), network(x_BTD[:, 1:5])
    return bool((y_BTD[:, 1:5] - shorter_BTD).abs().max() < 1e-5 * y_BTD.abs().max())


@pytest.mark.parametrize(("link", "apart"), KEEPS)
def test_an_operator_mixes_steps_where_the_numbers_say_so(link, apart):
    assert (first_mixed(*runs(link)) is None) == are_alone(link) == apart


@pytest.mark.parametrize("seed", range(8))
def test_a_chain_mixes_steps_where_a_link_does(seed):
    generator = random.Random(seed)
    chain = generator.choices(KEEPS, weights=[1 + 3 * apart for _, apart in KEEPS], k=4)

    def made(c: Call, x: Any) -> Any:
        for link, _ in chain:
            x = link(c, x)
        return x

    assert (first_mixed(*runs(made)) is None) == all(apart for _, apart in chain)
    assert are_alone(made) or not all(apart for _, apart in chain)


def steps(call: Call, x: Any) -> Any:
    return call(aten.arange.default, time(call, x))


def test_numbers_that_positions_sizes_and_counts_are_compared_with_are_told():
    def told(made: Made, *states: str) -> tuple[int, ...]:
        return constants_of_time(*runs(made), states)

    assert told(lambda c, x: c(aten.lt.Scalar, steps(c, x), 50)) == (50,)
    assert told(lambda c, x: c(aten.ge.Scalar, steps(c, x), -8.5)) == (9,)
    assert told(lambda c, x: c(aten.clamp.default, steps(c, x), max=60)) == (60,)
    assert told(lambda c, x: c(aten.clamp.default, steps(c, x), c(aten.sym_size.int, x, 2), 60)) == (60,)
    assert told(lambda c, x: c(aten.clamp.default, c(aten.clamp.default, steps(c, x), 2, 60), max=30)) == (2, 30, 60)
    assert told(lambda c, x: c(aten.gt.Scalar, c(aten.cumsum.default, x, 1), 3)) == (3,)
    assert told(lambda c, x: c(aten.lt.Scalar, steps(c, x), END)) == ()
    assert told(lambda c, x: c(aten.lt.Scalar, x, 50)) == ()  # the caller's values
    assert told(lambda c, x: c(aten.lt.Scalar, c(aten.neg.default, x), 50)) == ()
    assert told(lambda c, x: c(aten.clamp.default, weight(c, 4), 3, time(c, x))) == (3,)
    assert told(lambda c, x: c(aten.clamp.default, weight(c, 4), 3, c(aten.sym_size.int, x, 2))) == ()
    assert told(lambda c, x: c(aten.lt.Scalar, x, 50), "x") == (50,)  # which a state's are not
    assert told(lambda c, x: c(aten.add.Scalar, steps(c, x), 50)) == ()
    assert told(lambda c, x: c(aten.lt.Scalar, weight(c, 4), 50)) == ()  # and which is no matter of time
