"""B batch, T time, D width, E units"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import fx, nn

from tests.captured import traced
from tests.models import seeded, vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.graph.opaque_cells import OpaqueCells
from thesean.passes.graph.text import text
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.split_layers import SplitLayers


class Stack(nn.Module):
    """x_BTD -> y_BTE of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 4, num_layers=2, batch_first=True, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


def stack() -> fx.GraphModule:
    with warnings.catch_warnings(), OpaqueCells():
        # as in capture: nn.GRU puts its weights in a list of its own in forward; torch puts it back
        warnings.filterwarnings("ignore", message="(?s).*assigned during export")
        return traced(seeded(Stack), vectors(2, 5, 3))


def test_the_graph_before_and_after():
    graph_module = stack()
    first, second = (f"cell_weight_ih_l{i}, cell_weight_hh_l{i}" for i in (0, 1))
    before = [line for line in text(graph_module.graph) if "get_attr" not in line]
    assert before == [
        "x = placeholder x",
        "zeros = aten.zeros.default([2, 2, 4], dtype=torch.float32, device=cpu, pin_memory=False)",
        f"recurrent = thesean.recurrent.default(x, [zeros], [{first}, {second}], gru, False, 2, False)",
        "getitem = getitem(recurrent, 0)",
        "getitem_1 = getitem(recurrent, 1)",
        "return (getitem,)",
    ]
    SplitLayers()(graph_module)
    assert [line for line in text(graph_module.graph) if "get_attr" not in line] == [
        *before[:2],
        "slice_tensor = aten.slice.Tensor(zeros, 0, 0, 1)",
        f"gru_input = aten.gru.input(x, slice_tensor, [{first}], False, 1, 0.0, False, False, True)",
        "getitem_2 = getitem(gru_input, 0)",
        "slice_tensor_1 = aten.slice.Tensor(zeros, 0, 1, 2)",
        f"gru_input_1 = aten.gru.input(getitem_2, slice_tensor_1, [{second}], False, 1, 0.0, False, False, True)",
        "getitem_4 = getitem(gru_input_1, 0)",
        "return (getitem_4,)",
    ]
    x = vectors(2, 5, 3, seed=1)
    torch.testing.assert_close(graph_module(x), seeded(Stack)(x))


class Last(nn.Module):
    """A classifier over the last state, read in one of the usual ways."""

    def __init__(self, read: str, **settings: object) -> None:
        super().__init__()
        self.read = read
        self.cell = nn.GRU(4, 6, batch_first=True, **settings)
        self.head = nn.Linear(12 if settings.get("bidirectional") else 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, last = self.cell(x)
        match self.read:
            case "last":
                return self.head(last[-1])
            case "squeezed":
                return self.head(last.squeeze(0))
            case "both":
                return self.head(torch.cat([last[-2], last[-1]], -1))
        return self.head(last.transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("read", "settings", "parts"),
    [
        ("last", dict(num_layers=2), ["cell.l0", "cell.l1"]),
        ("squeezed", {}, ["cell"]),
        ("both", dict(bidirectional=True), ["cell"]),
    ],
)
def test_a_last_state_is_read_off_the_output_so_that_the_layer_is_a_part(read, settings, parts):
    torch.manual_seed(0)
    model = Last(read, **settings).eval()
    captured = capture(model, vectors(2, 5, 4))
    for batch, time in ((1, 1), (3, 9)):
        x = vectors(batch, time, 4, seed=2)
        torch.testing.assert_close(captured.graph_module(x), model(x), rtol=0, atol=1e-6)
    plan = make_plan(captured, "rnn", parts=parts).plan
    assert [p.path for p in plan] == parts
    assert plan.parts[0].input_shape == ("batch", "time", 4)
    assert plan.parts[0].mixing == ("bidirectional" if read == "both" else "causal")


def test_a_graph_without_cells_is_left_alone():
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), vectors(2, 4))
    result = SplitLayers()(captured.graph_module)
    assert not result.modified
    assert result.reason == "the graph has no recurrent cell"


def example() -> Example:
    return Example(SplitLayers(), stack(), (vectors(2, 5, 3, seed=1),))
