from __future__ import annotations

import pytest
import torch

from tests.captured import traced
from tests.models import Calling, vectors
from tests.passes.contract import Example
from thesean.passes.folds_as_modules import FoldsAsModules
from thesean.passes.graph.text import text


def test_the_graph_before_and_after():
    graph_module = traced(Calling(lambda x: x.logcumsumexp(-1).tanh()), vectors(2, 3))
    assert text(graph_module.graph) == [
        "x = placeholder x",
        "logcumsumexp = aten.logcumsumexp.default(x, -1)",
        "tanh = aten.tanh.default(logcumsumexp)",
        "return (tanh,)",
    ]
    assert text(FoldsAsModules()(graph_module).graph_module.graph) == [
        "x = placeholder x",
        "fold_0 = fold_0(x)",
        "getitem = getitem(fold_0, 0)",
        "tanh = aten.tanh.default(getitem)",
        "return (tanh,)",
    ]


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x.cumprod(1, dtype=torch.float64).float(),
        lambda x: x.cummax(2).values,
        lambda x: torch.cummin(x, -1)[0],
        lambda x: x.cumprod(1).logcumsumexp(2),
    ],
    ids=["product", "largest", "least", "two"],
)
def test_values_are_the_operators(of):
    x = vectors(2, 5, 3)
    graph_module = traced(Calling(of), x)
    result = FoldsAsModules()(graph_module)
    assert result.modified
    torch.testing.assert_close(result.graph_module(x), of(x))


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x.cummax(1).indices,
        lambda x: x.cumprod(0),
        lambda x: (10 * x).long().cummax(1).values,
        lambda x: x.cumsum(1),
    ],
    ids=["places", "over examples", "whole numbers", "a sum"],
)
def test_what_else_there_is_stays(of):
    graph_module = traced(Calling(of), vectors(2, 5))
    result = FoldsAsModules()(graph_module)
    assert result.reason == "nothing is folded over all numbers so far"


def example() -> Example:
    return Example(FoldsAsModules(), traced(Calling(lambda x: x.cummax(1).values), vectors(2, 4)), (vectors(2, 4),))
