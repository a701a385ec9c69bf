from __future__ import annotations

import torch
from torch import nn

from tests.captured import traced
from tests.models import vectors
from tests.passes.contract import Example
from thesean.passes.graph.text import text
from thesean.passes.views_as_reshapes import ViewsAsReshapes


class Flattened(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._unsafe_view(x.view(2, 6) * 2, [3, 4])


def example() -> Example:
    return Example(ViewsAsReshapes(), traced(Flattened(), vectors(2, 3, 2)), [vectors(2, 3, 2, seed=1)])


def test_views_are_reshapes_whatever_made_them():
    result = ViewsAsReshapes()(traced(Flattened(), vectors(2, 3, 2)))
    assert text(result.graph_module.graph)[1:-1] == [
        "view = aten.reshape.default(x, [2, 6])",
        "mul = aten.mul.Tensor(view, 2)",
        "_unsafe_view = aten.reshape.default(mul, [3, 4])",
    ]
    turned = vectors(3, 2, 2).transpose(0, 1)
    torch.testing.assert_close(result.graph_module(turned), turned.reshape(3, 4) * 2)


def test_a_graph_without_views_is_left_alone():
    result = ViewsAsReshapes()(traced(nn.GELU(), vectors(2, 3)))
    assert (result.modified, result.reason) == (False, "no view hangs on how memory lies")
