from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.captured import traced
from tests.models import Calling, vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.text import text
from thesean.passes.graph.writes import writes
from thesean.passes.writes_into_views import WritesIntoViews


def written(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    first = y[:, 0]
    y[:, 1:] = x[:, :2]
    return y + first.unsqueeze(1)


def test_the_graph_before_and_after():
    graph_module = traced(Calling(written), vectors(2, 3))
    assert text(graph_module.graph) == [
        "x = placeholder x",
        "mul = aten.mul.Tensor(x, 2)",
        "select = aten.select.int(mul, 1, 0)",
        "slice_1 = aten.slice.Tensor(x, 1, 0, 2)",
        "slice_2 = aten.slice.Tensor(mul, 1, 1, 9223372036854775807)",
        "copy_ = aten.copy_.default(slice_2, slice_1)",
        "unsqueeze = aten.unsqueeze.default(select, 1)",
        "add = aten.add.Tensor(mul, unsqueeze)",
        "return (add,)",
    ]
    result = WritesIntoViews()(graph_module)
    assert result.modified
    assert text(result.graph_module.graph) == [
        "x = placeholder x",
        "mul = aten.mul.Tensor(x, 2)",
        "slice_1 = aten.slice.Tensor(x, 1, 0, 2)",
        "slice_2 = aten.slice.Tensor(mul, 1, 1, 9223372036854775807)",
        "copy_ = aten.copy.default(slice_2, slice_1)",
        "slice_scatter_default = aten.slice_scatter.default(mul, copy_, 1, 1, 9223372036854775807, 1)",
        "select_int = aten.select.int(slice_scatter_default, 1, 0)",
        "unsqueeze = aten.unsqueeze.default(select_int, 1)",
        "add = aten.add.Tensor(slice_scatter_default, unsqueeze)",
        "return (add,)",
    ]
    x = vectors(2, 3, seed=1)
    assert torch.equal(result.graph_module(x)[0], written(x))
    assert [str(n.target) for n in writes(graph_module)] == ["aten.copy_.default"]  # it stayed as it was


def rows_one_by_one(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    for step in range(x.shape[1]):
        y[:, step] = x[:, step] + (y[:, step - 1] if step else 0)
    return y


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """As rotary embeddings of three axes are put together."""
    of = x.sin().expand(3, *x.shape) * torch.arange(1.0, 4.0).view(3, 1, 1)
    first = of[0]
    for axis in (1, 2):
        first[..., axis::3] = of[axis, ..., axis::3]
    return torch.cat([first, of[0], first], -1)


def inverse_row_by_row(x: torch.Tensor) -> torch.Tensor:
    """As chunks of a delta rule are solved: rows of a matrix, part of each, from those above."""
    lower = -(x.unsqueeze(-1) * x.unsqueeze(-2)).tril(-1)
    for row in range(1, x.shape[1]):
        own, above = lower[..., row, :row].clone(), lower[..., :row, :row].clone()
        lower[..., row, :row] = own + (own.unsqueeze(-1) * above).sum(-2)
    return lower


def through_a_transpose(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    turned = y.t().unsqueeze(0).permute(2, 0, 1)
    turned[0].mul_(3).add_(1)
    y[0, 1] -= 5
    return turned.squeeze(1) + y


def into_what_came_of_a_write(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    part = y[:, :1].fill_(2.0)
    part += 3
    y[:, 1:].zero_()
    return torch.cat([part, y, part.detach()], 1)


def kept_before(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    before, apart = y[:, 0] * 1, y[:, 0].clone()
    y[:, 0] = 7
    return torch.stack([before, apart, y[:, 0]])


OF = (
    rows_one_by_one, interleaved, inverse_row_by_row, through_a_transpose, into_what_came_of_a_write, kept_before
)  # fmt: skip


@pytest.mark.parametrize("of", OF, ids=lambda of: of.__name__)
def test_values_are_those_of_memory(of: Callable[[torch.Tensor], torch.Tensor]):
    result = WritesIntoViews()(traced(Calling(of), vectors(3, 4)))
    assert result.modified
    assert not writes(result.graph_module)
    x = vectors(3, 4, seed=1)
    assert torch.equal(result.graph_module(x)[0], of(x))


def program(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Views of views, writes into some of them, and a look at all of them at the end."""

    def run(x: torch.Tensor) -> torch.Tensor:
        draw = random.Random(seed)
        held: list[torch.Tensor] = [x * 2, x + 1]
        for _ in range(12):
            of = draw.choice(held)
            dim = draw.randrange(of.ndim) if of.ndim else 0
            act = draw.choice(["select", "slice", "unsqueeze", "transpose", "detach", "write", "write", "sum"])
            if act == "select" and of.ndim > 1:
                held.append(of.select(dim, draw.randrange(of.shape[dim])))
            elif act == "slice" and of.ndim and of.shape[dim] > 1:
                held.append(of.narrow(dim, 1, of.shape[dim] - 1))
            elif act == "unsqueeze" and of.ndim < 4:
                held.append(of.unsqueeze(dim))
            elif act == "transpose" and of.ndim > 1:
                held.append(of.transpose(0, dim))
            elif act == "detach":
                held.append(of.detach())
            elif act == "write":
                value = draw.choice(held).sum() + 1
                acts: tuple[Any, ...] = (of.mul_, of.copy_, of.fill_)
                held.append(draw.choice(acts)(value))
            elif act == "sum":
                held.append(of + draw.choice(held).mean())
        return torch.stack([h.sin().sum() * (k + 1) for k, h in enumerate(held)])

    return run


@pytest.mark.parametrize("seed", range(30))
def test_any_views_and_writes_are_followed(seed: int):
    of = program(seed)
    graph_module = traced(Calling(of), vectors(3, 4))
    result = WritesIntoViews()(graph_module)
    assert result.modified == bool(writes(graph_module))
    assert not writes(result.graph_module)
    x = vectors(3, 4, seed=1)
    (found,) = leaf_values(result.graph_module(x))
    torch.testing.assert_close(found, of(x), rtol=1e-5, atol=1e-4)  # sums over other strides


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count[1:] += 1
        return x + self.count


def into_a_reshape(x: torch.Tensor) -> torch.Tensor:
    y = (x + 1).t()
    y.reshape(-1)[1:] = 0
    return y


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Counting(), "writes where it can't be followed"), (Calling(into_a_reshape), "writes where it can't be followed")],
    ids=["a buffer", "what may be a copy"],
)
def test_what_can_not_be_followed_is_left_to_torch(model: torch.nn.Module, reason: str):
    graph_module = traced(model, vectors(3, 3))
    result = WritesIntoViews()(graph_module)
    assert not result.modified
    assert result.graph_module is graph_module
    assert reason in result.reason


def test_a_capture_writes_nowhere_without_taking_other_operators_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    graph_module = capture(
        Calling(lambda x: written(torch.nn.functional.layer_norm(x, x.shape[1:]))), vectors(2, 3)
    ).graph_module
    assert not writes(graph_module)
    assert [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.layer_norm.default]
    x = vectors(4, 3, seed=1)
    torch.testing.assert_close(graph_module(x), written(torch.nn.functional.layer_norm(x, x.shape[1:])))


def test_a_graph_without_writes_is_the_same_object_and_the_reason_told():
    graph_module = traced(Calling(torch.sin), vectors(2, 3))
    result = WritesIntoViews()(graph_module)
    assert result.graph_module is graph_module
    assert result.reason == "no operator writes into its input"


def example() -> Example:
    return Example(WritesIntoViews(), traced(Calling(written), vectors(2, 3)), (vectors(2, 3),))
