"""B batch, T time, D width, E units"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import seeded, vectors
from thesean.errors import PlanError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.nodes import owner
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.split_layers import SplitLayers

CASES = [
    (nn.LSTM, {}), (nn.LSTM, dict(num_layers=2, bidirectional=True)), (nn.LSTM, dict(num_layers=3, bias=False)),
    (nn.LSTM, dict(proj_size=3, num_layers=2)), (nn.GRU, dict(bidirectional=True)), (nn.GRU, dict(num_layers=2)),
    (nn.RNN, dict(nonlinearity="relu")), (nn.RNN, dict(num_layers=2)), (nn.LSTM, dict(batch_first=False)),
]  # fmt: skip


class Everything(nn.Module):
    """x_BTD -> (y_BTE, all last states)."""

    def __init__(self, cell: type[nn.RNNBase], settings: dict) -> None:
        super().__init__()
        self.time_first = settings.get("batch_first") is False
        self.cell = cell(4, 6, **{"batch_first": True, **settings})  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, last = self.cell(x.transpose(0, 1) if self.time_first else x)
        return (y.transpose(0, 1) if self.time_first else y, *(last if isinstance(last, tuple) else (last,)))


def cells_of(captured: Captured) -> list[torch.fx.Node]:
    return [n for n in captured.graph_module.graph.nodes if n.target in CELLS]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("cell", "settings"), CASES)
def test_a_cell_is_one_operator_a_layer_and_gives_its_outputs_and_states_at_any_length(cell, settings):
    model = seeded(Everything, cell, settings)
    captured = capture(model, vectors(2, 5, 4))
    assert len(cells_of(captured)) == settings.get("num_layers", 1)
    for batch, time in ((1, 1), (3, 9), (2, 40)):
        x = vectors(batch, time, 4, seed=1)
        for found, expected in zip(captured.graph_module(x), model(x), strict=True):
            torch.testing.assert_close(found, expected)


def test_layers_are_named_like_their_weights_and_those_that_hand_on_their_states_are_no_parts():
    captured = capture(seeded(Everything, nn.LSTM, dict(num_layers=2)), vectors(2, 5, 4))
    assert [owner(n) for n in cells_of(captured)] == ["cell.l0", "cell.l1"]
    with pytest.raises(PlanError, match="found no repeated single-entry single-exit region"):
        make_plan(captured, "gru")


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


def test_a_cell_trains_inside_the_graph():
    captured = capture(seeded(Everything, nn.LSTM, {}), vectors(2, 5, 4))
    captured.graph_module(vectors(2, 7, 4))[0].square().sum().backward()
    gradients = [p.grad for p in captured.graph_module.parameters()]
    assert gradients
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)
