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
from thesean.targets import Target

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
    with pytest.raises(PlanError, match=r"found no part: cell\.l0, cell\.l1 return a last state that is read beside"):
        make_plan(captured, "gru")


class Told(nn.Module):
    """x_BTD -> y_BTD and the last state of a cell behind two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))
        self.cell = nn.GRU(4, 4, num_layers=5, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            x = x + block(x)
        y, last = self.cell(x)
        return x + y, last


def test_a_cell_that_is_left_out_for_its_state_is_told_with_what_to_do():
    plan = make_plan(capture(seeded(Told), vectors(2, 5, 4)), Target("mlp", tokens="each")).plan
    (note,) = (n for n in plan.notes if "cell" in n)
    assert note.startswith("cell.l0, cell.l1, cell.l2 and 2 more are left to the guide: ")
    assert "a last state that is read beside it. Return the output alone" in note


def test_a_cell_trains_inside_the_graph():
    captured = capture(seeded(Everything, nn.LSTM, {}), vectors(2, 5, 4))
    captured.graph_module(vectors(2, 7, 4))[0].square().sum().backward()
    gradients = [p.grad for p in captured.graph_module.parameters()]
    assert gradients
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)
