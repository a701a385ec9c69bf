from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.captured import traced
from tests.models import vectors
from tests.passes.contract import Example
from thesean.passes.graph.text import text
from thesean.passes.simplify import Simplify


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.unread = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unused = x.exp()  # noqa: F841
        return (self.dropout(x.to(torch.float32).detach())[:] @ self.weight)[:, 1:]


def test_what_computes_nothing_goes_and_the_rest_stays():
    graph_module = traced(Idle(), vectors(2, 3))
    before = [line for line in text(graph_module.graph) if "aten" in line]
    assert [line.split("(")[0].split(" = ")[1] for line in before] == [
        "aten.exp.default",
        "aten._assert_tensor_metadata.default",
        "aten.to.dtype",
        "aten.detach.default",
        "aten.dropout.default",
        "aten.slice.Tensor",
        "aten.matmul.default",
        "aten.slice.Tensor",
    ]
    result = Simplify()(graph_module)
    assert result.modified
    assert text(result.graph_module.graph)[0:1] == ["weight = get_attr weight"]
    assert [line for line in text(result.graph_module.graph) if "aten" in line] == [
        "matmul = aten.matmul.default(x, weight)",
        "slice_2 = aten.slice.Tensor(matmul, 1, 1, 9223372036854775807)",
    ]


class Turned(nn.Module):
    def __init__(self, there: tuple[int, int], back: tuple[int, int]) -> None:
        super().__init__()
        self.there, self.back = there, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp().transpose(*self.there).transpose(*self.back) + 1


@pytest.mark.parametrize(
    ("there", "back", "stays"),
    [((1, 2), (1, 2), False), ((1, 2), (2, 1), False), ((1, 2), (-1, -2), False), ((1, 2), (0, 1), True)],
)
def test_what_is_transposed_and_back_is_not(there, back, stays):
    graph_module, x = traced(Turned(there, back), vectors(3, 3, 3)), vectors(3, 3, 3, seed=1)
    assert Simplify()(graph_module).modified != stays
    assert any("transpose" in line for line in text(graph_module.graph)) == stays
    torch.testing.assert_close(graph_module(x), Turned(there, back)(x), rtol=0, atol=0)


def test_outputs_stay_the_same():
    graph_module = traced(Idle(), vectors(2, 3))
    x = vectors(2, 3, seed=1)
    expected = graph_module(x)
    torch.testing.assert_close(Simplify()(graph_module).graph_module(x), expected, rtol=0, atol=0)


def test_a_graph_in_which_all_nodes_compute_is_left_alone():
    graph_module = Simplify()(traced(nn.Linear(3, 3), vectors(2, 3))).graph_module
    result = Simplify()(graph_module)
    assert result.graph_module is graph_module
    assert not result.modified
    assert result.reason == "every node computes something"


class LastOfAll(nn.Module):
    """As many of the last steps as there are, and a number of them."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask[:, -x.shape[1] :].unsqueeze(2) + mask[:, -2:].sum()


def test_a_slice_is_full_where_it_is_as_long_as_what_it_cuts_whatever_the_length():
    time = Dim("time", min=3)
    example = (vectors(2, 7, 3), torch.ones(2, 7))
    program = torch.export.export(LastOfAll(), example, dynamic_shapes=({1: time}, {1: time}))
    graph_module = Simplify()(program.module()).graph_module
    assert [n.args[1:] for n in graph_module.graph.nodes if "slice" in str(n.target)] == [(1, -2, 9223372036854775807)]


class Casts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float64)[1:] * 2


class TrainingDropout(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    ("model", "kept"), [(Casts(), "aten.to.dtype"), (Casts(), "aten.slice"), (TrainingDropout(), "aten.dropout")]
)
def test_real_casts_partial_slices_and_active_dropout_stay(model, kept):
    graph_module = Simplify()(traced(model, vectors(4, 3))).graph_module
    assert any(kept in line for line in text(graph_module.graph))


def example() -> Example:
    return Example(Simplify(), traced(Idle(), vectors(2, 3)), (vectors(2, 3, seed=1),))
