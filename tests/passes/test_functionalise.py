from __future__ import annotations

import torch
from torch import nn

from tests import captured
from tests.captured import traced
from tests.models import vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.functionalise import Functionalise
from thesean.passes.graph.text import text
from thesean.passes.graph.writes import writes


class Writing(nn.Module):
    """y is read before and after it is written to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        before = y.exp()
        y += x
        return before + y.relu_()


def test_an_operator_that_writes_becomes_one_that_returns_and_later_readers_read_its_result():
    graph_module = traced(Writing(), vectors(2, 3))
    assert text(graph_module.graph) == [
        "x = placeholder x",
        "mul = aten.mul.Tensor(x, 2)",
        "exp = aten.exp.default(mul)",
        "add_ = aten.add_.Tensor(mul, x)",
        "relu_ = aten.relu_.default(add_)",
        "add = aten.add.Tensor(exp, relu_)",
        "return (add,)",
    ]
    x = vectors(2, 3, seed=1)
    expected = Writing()(x)
    result = Functionalise()(graph_module)
    assert result.modified
    assert not writes(result.graph_module)
    assert text(result.graph_module.graph) == [
        "x = placeholder x",
        "mul = aten.mul.Tensor(x, 2)",
        "exp = aten.exp.default(mul)",
        "add_ = aten.add.Tensor(mul, x)",
        "relu_ = aten.relu.default(add_)",
        "add = aten.add.Tensor(exp, relu_)",
        "return (add,)",
    ]
    assert torch.equal(result.graph_module(x), expected)


class Widening(nn.Module):
    """x_BD in half precision keeps its dtype, and would not where a wider one is added to it."""

    def forward(self, x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += wide
        return y


def test_a_sum_in_place_keeps_its_dtype_where_a_wider_tensor_is_added():
    x, wide = vectors(2, 3).half(), vectors(2, 3, seed=1)
    found = capture(Widening(), {"x": x, "wide": wide}).graph_module(x=x, wide=wide)
    assert found.dtype == torch.float16
    assert torch.equal(found, Widening()(x, wide))


class WritingToTheOnlyView(nn.Module):
    """As classifiers do: a dropout in place of a map that was flattened, which nothing reads afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.flatten(x * 2, 1)
        self.dropout(y)
        z = y.view(-1, 3)
        z.add_(y.view(-1, 3))
        return z


def test_a_write_into_a_view_is_one_where_nothing_else_reads_what_it_views():
    model = WritingToTheOnlyView().eval()
    result = Functionalise()(traced(model, vectors(2, 3, 1)))
    assert result.modified
    assert not writes(result.graph_module)
    x = vectors(2, 3, 1, seed=1)
    assert torch.equal(result.graph_module(x), model(x))


class WritingToAView(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 0].add_(1)
        return y


def test_a_write_into_a_view_is_left_alone_and_told():
    graph_module = traced(WritingToAView(), vectors(2, 3))
    result = Functionalise()(graph_module)
    assert not result.modified
    assert [str(n.target) for n in writes(result.graph_module)] == ["aten.add_.Tensor"]


def test_a_captured_guide_writes_nowhere():
    found = capture(WritingToAView(), vectors(2, 3))
    assert not writes(found.graph_module)
    x = vectors(5, 3, seed=2)
    torch.testing.assert_close(found.graph_module(x), WritingToAView()(x), rtol=0, atol=0)


def test_a_graph_without_writes_is_the_same_object_and_the_reason_told():
    graph_module = captured.mlp().graph_module
    result = Functionalise()(graph_module)
    assert result.graph_module is graph_module
    assert result.reason == "no operator writes into its input"


class ReadingAView(nn.Module):
    """A view made before the write shows what was written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        first = y[:, 0]
        y.mul_(3)
        return first + y[:, 1]


def test_a_write_that_an_earlier_view_shows_is_captured_as_torch_computes_it():
    x = vectors(4, 3, seed=3)
    found = capture(ReadingAView(), vectors(2, 3))
    torch.testing.assert_close(found.graph_module(x), ReadingAView()(x), rtol=0, atol=0)


def example() -> Example:
    return Example(Functionalise(), traced(Writing(), vectors(2, 3)), (vectors(2, 3, seed=1),))
