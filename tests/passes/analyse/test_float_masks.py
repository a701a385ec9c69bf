"""Which inputs of floats are masks: by their numbers, and by what they meet.

B batch, T time, D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.models import vectors
from thesean.passes.analyse.float_masks import is_mask_of_floats

aten = torch.ops.aten

Made = Callable[..., Any]

X_BTD = vectors(2, 5, 4)
FLAGS_BT = torch.ones(2, 5)
FLAGS_BT[1, 3:] = 0
HIDES_BT = (1 - FLAGS_BT) * -1e4


class Noted(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def is_mask(mask: torch.Tensor, made: Made) -> bool:
    """Of the input `mask` beside x_BTD, in a graph with a table of weights; every node knows its value."""
    root = nn.Module()
    root.register_parameter("weight", nn.Parameter(torch.ones(5, 5)))
    graph = fx.Graph()
    x, given, table = graph.placeholder("x"), graph.placeholder("mask"), graph.get_attr("weight")
    graph.output(made(lambda target, *args: graph.call_function(target, args), x, given, table))
    Noted(fx.GraphModule(root, graph)).run(X_BTD, mask)
    return is_mask_of_floats(given, mask)


def times(call: Made, x: Any, mask: Any, table: Any) -> Any:
    return call(aten.mul.Tensor, x, call(aten.unsqueeze.default, mask, -1))


def times_as_it_is(call: Made, x: Any, mask: Any, table: Any) -> Any:
    return call(aten.mul.Tensor, x, mask)


def added(call: Made, x: Any, mask: Any, table: Any) -> Any:
    scores = call(aten.matmul.default, x, call(aten.transpose.int, x, 1, 2))
    return call(aten.add.Tensor, scores, call(aten.unsqueeze.default, mask, 1))


def turned(call: Made, x: Any, mask: Any, table: Any) -> Any:
    hides = call(aten.mul.Tensor, call(aten.rsub.Scalar, mask, 1), -1e4)
    return added(call, x, hides, table)


MASKS: dict[str, tuple[torch.Tensor, Made]] = {
    "flags": (FLAGS_BT, times),
    "flags with a width of one": (FLAGS_BT.unsqueeze(-1), times_as_it_is),
    "flags that become a bias": (FLAGS_BT, turned),
    "a bias": (HIDES_BT, added),
    "a bias of a hundred": (HIDES_BT / 100, added),
    "a bias of pairs": (
        HIDES_BT.unsqueeze(1).expand(2, 5, 5), lambda c, x, m, w: added(c, x, c(aten.select.int, m, 1, 0), w)
    ),
    "all ones": (torch.ones(2, 5), times),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_told_by_numbers_and_use(name):
    assert is_mask(*MASKS[name])


OTHERS: dict[str, tuple[torch.Tensor, Made]] = {
    "integers": (FLAGS_BT.long(), times),
    "no time": (torch.ones(5), lambda c, x, m, w: c(aten.mul.Tensor, x, c(aten.view.default, m, [5, 1]))),
    "nothing": (torch.ones(2, 0), lambda c, x, m, w: c(aten.mul.Tensor, x, c(aten.sum.default, m))),
    "other numbers": (FLAGS_BT * 0.5, times),
    "flags with a width": (torch.ones(2, 5, 4), times_as_it_is),
    "zeros with a width": (torch.zeros(2, 5, 4), times_as_it_is),
    "a bias that hides too little": (HIDES_BT / 1e3, added),
    "beside weights": (FLAGS_BT, lambda c, x, m, w: c(aten.matmul.default, m, w)),
    "beside both": (FLAGS_BT, lambda c, x, m, w: c(aten.add.Tensor, times(c, x, m, w), c(
        aten.unsqueeze.default, c(aten.matmul.default, m, w), -1))),
    "joined": (FLAGS_BT, lambda c, x, m, w: c(aten.cat.default, [x, c(aten.unsqueeze.default, m, -1)], -1)),
    "beside nothing": (FLAGS_BT, lambda c, x, m, w: c(aten.mul.Tensor, m, 2.0)),
    "beside sizes alone": (FLAGS_BT, lambda c, x, m, w: c(aten.mul.Tensor, m, c(aten.full.default, [2, 5], 2.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_holds_or_meets_anything_else_is_none(name):
    assert not is_mask(*OTHERS[name])
