"""A guide's own recurrent cells, as state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.passes.contract import Example
from tests.passes.test_cache_steps import assert_chunks_equal_whole
from thesean.errors import PassRefused
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.carry_cells import CarryCells
from thesean.passes.graph.kept_cell import KeptCell
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.graph.text import text
from thesean.passes.thread_state import ThreadState

WIDTH = 8
WEIGHTS = "cell_weight_ih_l0, cell_weight_hh_l0, cell_bias_ih_l0, cell_bias_hh_l0"
KINDS = {
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "two layers": lambda: nn.GRU(WIDTH, WIDTH, 2, batch_first=True),
    "without biases": lambda: nn.RNN(WIDTH, WIDTH, batch_first=True, bias=False, nonlinearity="relu"),
    "projected": lambda: nn.LSTM(WIDTH, 2 * WIDTH, batch_first=True, proj_size=WIDTH),
    "elman": lambda: nn.RNN(WIDTH, WIDTH, batch_first=True),
}


class Tagger(nn.Module):
    """Steps told by a cell, and by how it ended."""

    def __init__(self, cell: nn.RNNBase, ending: bool = False) -> None:
        super().__init__()
        self.first, self.cell, self.last, self.ending = nn.Linear(WIDTH, WIDTH), cell, nn.Linear(WIDTH, 3), ending

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, last = self.cell(self.first(x))
        told = self.last(y)
        return (told, *(last if isinstance(last, tuple) else (last,))) if self.ending else (told,)


def guide_of(cell: nn.RNNBase, ending: bool = False) -> Captured:
    return capture(models.seeded(Tagger, cell, ending), models.vectors(3, 11, WIDTH))


def threaded(guide: Captured) -> fx.GraphModule:
    return ThreadState(guide.signature)(CarryCells(guide.signature)(guide.graph_module).graph_module).graph_module


def test_the_graph_before_and_after():
    guide = guide_of(nn.GRU(WIDTH, WIDTH, batch_first=True))
    before = text(guide.graph_module.graph)
    after = text(CarryCells(guide.signature)(guide.graph_module).graph_module.graph)
    assert text(guide.graph_module.graph) == before
    assert before[-4:-1] == [
        f"gru_input = aten.gru.input(linear, zeros, [{WEIGHTS}], True, 1, 0.0, False, False, True)",
        "getitem_2 = getitem(gru_input, 0)",
        "linear_1 = aten.linear.default(getitem_2, last_weight, last_bias)",
    ]
    assert after[-5:] == [
        "linear = aten.linear.default(x, first_weight, first_bias)",
        "kept_0 = kept_0(linear)",
        "getitem = getitem(kept_0, 0)",
        "linear_1 = aten.linear.default(getitem, last_weight, last_bias)",
        "return (linear_1,)",
    ]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_whole(kind):
    guide = guide_of(KINDS[kind]())
    stateful = threaded(guide)
    assert stateful.meta["rows_are_alone"]
    assert_chunks_equal_whole(stateful, guide, {"x": models.vectors(2, 12, WIDTH)})


def test_a_state_that_the_guide_returns_is_that_after_each_chunk():
    guide = guide_of(KINDS["lstm"](), ending=True)
    stateful = threaded(guide)
    x = models.vectors(2, 12, WIDTH)
    whole = guide.graph_module(x)
    zeros = [torch.zeros(2, WIDTH)] * 2
    *_, hidden, cell = stateful(x[:, :5], *zeros)
    *told, _, _ = stateful(x[:, 5:], hidden, cell)
    for got, want in zip(told[1:], whole[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_the_weights_are_the_guides_own():
    guide = guide_of(KINDS["lstm"]())
    cached = CarryCells(guide.signature)(guide.graph_module).graph_module
    (kept,) = (m for m in cached.modules() if isinstance(m, KeptCell))
    assert {id(p) for p in kept.parameters()} <= {id(p) for p in guide.graph_module.parameters()}


class Starting(nn.Module):
    """A cell that starts where something else says."""

    def __init__(self, cell: nn.RNNBase, of: str) -> None:
        super().__init__()
        self.cell, self.of = cell, of
        self.start = nn.Parameter(torch.linspace(-1, 1, 2 * WIDTH).view(2, 1, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> Any:
        start = x[:, :1].transpose(0, 1).expand(2, 1, -1, -1) if self.of == "data" else self.start
        hidden, memory = start.expand(2, 1, x.shape[0], WIDTH).contiguous()
        y, last = self.cell(x, (hidden, memory) if isinstance(self.cell, nn.LSTM) else hidden)
        return (y, last) if self.of == "given away" else y


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_a_cell_that_learnt_where_to_start_starts_there(cell):
    guide = capture(
        models.seeded(Starting, cell(WIDTH, WIDTH, batch_first=True), "learnt"), models.vectors(3, 11, WIDTH)
    )
    stateful = threaded(guide)
    assert stateful.meta["rows_are_alone"]
    assert_chunks_equal_whole(stateful, guide, {"x": models.vectors(2, 12, WIDTH)})


@pytest.mark.parametrize("of", ["data", "given away"])
def test_a_cell_that_starts_otherwise_stays(of):
    cell = nn.GRU(WIDTH, WIDTH, batch_first=True)
    guide = capture(models.seeded(Starting, cell, of), models.vectors(3, 11, WIDTH))
    result = CarryCells(guide.signature)(guide.graph_module)
    assert result.reason == "no recurrent cell reads time from the front on, from where it always starts"


def test_a_cell_that_reads_both_ways_stays():
    guide = guide_of(nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True))
    result = CarryCells(guide.signature)(guide.graph_module)
    assert not result.modified
    assert [n for n in result.graph_module.graph.nodes if n.target in CELLS]
    with pytest.raises(PassRefused, match="thread state"):
        ThreadState(guide.signature)(guide.graph_module)


def test_what_has_no_time_is_left_alone():
    image = captured.resnet()
    assert CarryCells(image.signature)(image.graph_module).reason == "there is no single dimension of time"


@pytest.mark.parametrize("kind", ["lstm", "elman"])
def test_steps_that_hold_nothing_leave_the_state(kind):
    cell = KeptCell(KINDS[kind]()).eval()
    x, mask = models.vectors(2, 5, WIDTH), torch.tensor([[True] * 5, [False, False, True, True, True]])
    y, after = cell(x, mask=mask)
    whole, ended = cell(x)
    alone, left = cell(x[1:, 2:])
    torch.testing.assert_close(y[:1], whole[:1])
    torch.testing.assert_close(y[1, 2:], alone[0])
    for got, first, second in zip(*((s,) if torch.is_tensor(s) else s for s in (after, ended, left)), strict=True):
        torch.testing.assert_close(got, torch.cat([first[:1], second]))


def example() -> Example:
    guide = guide_of(KINDS["two layers"]())
    return Example(CarryCells(guide.signature), guide.graph_module, (models.vectors(3, 9, WIDTH),))
