from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.captured import traced
from tests.models import seeded, vectors
from tests.passes.contract import Example
from thesean.errors import PassRefused
from thesean.passes.capture.capture import capture
from thesean.passes.graph.text import text
from thesean.passes.inline_regions import InlineRegions


class Regions(nn.Module):
    """A head in full precision, as mixed-precision code has it, with a region inside of the region."""

    def __init__(self, enabled: bool = False) -> None:
        super().__init__()
        self.enabled, self.w = enabled, nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.w(x)
            with torch.autocast("cpu", enabled=self.enabled):
                y, z = y * 2, y @ x.t()
        return y.exp() + z.sum()


def test_a_region_that_changes_nothing_becomes_part_of_the_graph():
    model = seeded(Regions)
    graph_module = traced(model, vectors(2, 3))
    assert "wrap_with_autocast" in str(text(graph_module.graph))
    assert InlineRegions()(graph_module).modified
    assert text(graph_module.graph) == [
        "w_weight = get_attr w.weight",
        "w_bias = get_attr w.bias",
        "x = placeholder x",
        "linear = aten.linear.default(x, w_weight, w_bias)",
        "mul_2 = aten.mul.Tensor(linear, 2)",
        "t = aten.t.default(x)",
        "matmul_2 = aten.matmul.default(linear, t)",
        "exp = aten.exp.default(mul_2)",
        "sum_1 = aten.sum.default(matmul_2)",
        "add = aten.add.Tensor(exp, sum_1)",
        "return (add,)",
    ]
    x = vectors(2, 3, seed=1)
    torch.testing.assert_close(graph_module(x), model(x), rtol=0, atol=0)


class WithoutGradients(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x.abs()
            scale = y.amax(-1, keepdim=True)
        return x / scale + y


def test_a_region_without_gradients_is_captured_as_operators():
    model = WithoutGradients().eval()
    with torch.enable_grad():
        captured = capture(model, vectors(2, 3))
    assert not any("wrap_with" in line for line in text(captured.graph_module.graph))
    assert torch.equal(captured.graph_module(vectors(4, 3)), model(vectors(4, 3)))


def test_a_region_in_half_precision_is_refused_wherever_it_is():
    graph_module = traced(Regions(enabled=True), vectors(2, 3))
    before = text(graph_module.graph)
    with pytest.raises(PassRefused, match=r"runs under torch\.autocast\('cpu', torch\.bfloat16\)"):
        InlineRegions()(graph_module)
    assert text(graph_module.graph) == before


def example() -> Example:
    return Example(InlineRegions(), traced(seeded(Regions), vectors(2, 3)), (vectors(2, 3, seed=1),))
