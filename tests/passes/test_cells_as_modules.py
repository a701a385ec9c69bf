"""B batch, T time, D width, E units"""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from tests import captured
from tests.models import seeded, vectors
from tests.passes.contract import Example
from thesean.errors import PassRefused
from thesean.passes.capture.capture import capture
from thesean.passes.cells_as_modules import CellsAsModules
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.graph.text import text


class Kept(nn.Module):
    """x_BTD -> (y_BTE, all last states)."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, last = self.cell(x)
        return (y, *(last if isinstance(last, tuple) else (last,)))


def cells(graph_module: fx.GraphModule) -> list[str]:
    """The lines from the cell on."""
    lines = text(graph_module.graph)
    return lines[next(i for i, line in enumerate(lines) if "gru_input =" in line or "cell_0 =" in line) :]


def test_the_graph_before_and_after():
    guide = capture(seeded(Kept, nn.GRU(4, 5, batch_first=True, bias=False)), vectors(2, 6, 4)).graph_module
    weights = "cell_weight_ih_l0, cell_weight_hh_l0"
    before = [
        f"gru_input = aten.gru.input(x, zeros, [{weights}], False, 1, 0.0, False, False, True)",
        "getitem_2 = getitem(gru_input, 0)",
        "getitem_3 = getitem(gru_input, 1)",
        "return (getitem_2, getitem_3)",
    ]
    assert cells(guide) == before
    result = CellsAsModules()(guide)
    assert cells(result.graph_module) == [
        "cell_0 = cell_0(x, zeros)",
        "getitem = getitem(cell_0, 0)",
        "getitem_4 = getitem(cell_0, 1)",
        "return (getitem, getitem_4)",
    ]
    assert cells(guide) == before
    assert isinstance(result.graph_module.cell_0, nn.GRU)


@pytest.mark.parametrize(
    "cell",
    [
        nn.LSTM(4, 5, num_layers=2, batch_first=True),
        nn.GRU(4, 5, batch_first=True, bidirectional=True),
        nn.RNN(4, 5, batch_first=True, bias=False, nonlinearity="relu"),
    ],
)
def test_a_guides_own_operators_become_modules_that_give_the_same(cell):
    guide = capture(Kept(cell).eval(), vectors(2, 6, 4)).graph_module
    graph_module = CellsAsModules()(guide).graph_module
    assert not [n for n in graph_module.graph.nodes if n.target in CELLS]
    x = vectors(3, 9, 4, seed=1)
    for found, expected in zip(graph_module(x), guide(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_graph_without_cells_is_not_copied():
    guide = captured.mlp().graph_module
    result = CellsAsModules()(guide)
    assert result.graph_module is guide
    assert result.reason == "the graph has no recurrent operator"


def test_a_cell_whose_weights_are_computed_is_refused():
    graph_module = capture(seeded(Kept, nn.GRU(4, 5, batch_first=True)), vectors(2, 6, 4)).graph_module
    (cell,) = (n for n in graph_module.graph.nodes if n.target in CELLS)
    with graph_module.graph.inserting_before(cell):
        halved = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (cell.args[2][0], 0.5))
    cell.update_arg(2, [halved, *cell.args[2][1:]])
    with pytest.raises(PassRefused, match="expected weights that are parameters, found mul_tensor, which is computed"):
        CellsAsModules()(graph_module)


def example() -> Example:
    guide = capture(seeded(Kept, nn.GRU(4, 5, batch_first=True)), vectors(2, 6, 4)).graph_module
    return Example(CellsAsModules(), guide, (vectors(3, 9, 4, seed=1),))
