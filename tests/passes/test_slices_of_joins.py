from __future__ import annotations

import torch
from torch import nn

from tests.captured import traced
from tests.models import vectors
from tests.passes.contract import Example
from thesean.passes.graph.text import text
from thesean.passes.slices_of_joins import SlicesOfJoins


class Joined(nn.Module):
    """Slices of two values side by side: both, and one that is neither."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([x.sin(), x.cos()], -1)
        return joined[..., :4] + 2 * joined[..., 4:8] + 3 * joined[..., 2:6]


def example() -> Example:
    return Example(SlicesOfJoins(), traced(Joined(), vectors(2, 3, 4)), [vectors(2, 3, 4, seed=1)])


def test_a_slice_that_is_a_piece_is_that_piece():
    before = example().graph_module
    lines = text(SlicesOfJoins()(before).graph_module.graph)
    assert lines[1:-1] == [
        "sin = aten.sin.default(x)",
        "cos = aten.cos.default(x)",
        "cat = aten.cat.default([sin, cos], -1)",
        "mul = aten.mul.Tensor(cos, 2)",
        "add = aten.add.Tensor(sin, mul)",
        "slice_3 = aten.slice.Tensor(cat, 2, 2, 6)",
        "mul_1 = aten.mul.Tensor(slice_3, 3)",
        "add_1 = aten.add.Tensor(add, mul_1)",
    ]
    assert sum("slice" in line.split(" = ")[0] for line in text(before.graph)) == 3  # it stayed as it was


def test_a_graph_without_one_is_left_alone():
    class Elsewhere(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            joined = torch.cat([x, x + 1], 1)
            return joined[:, 1:4] + joined[..., :2].sum() + joined[:, 0:6:2]

    result = SlicesOfJoins()(traced(Elsewhere(), vectors(2, 3, 4)))
    assert (result.modified, result.reason) == (False, "no slice is a piece of what was joined")
