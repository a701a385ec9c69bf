"""B batch, T time, D width"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from tests.models import vectors
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target


class Reader(nn.Module):
    """x_BTD -> y_BTC through one recurrent layer."""

    def __init__(self, cell: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0])


@cache
def reader(kind: str) -> Captured:
    torch.manual_seed(0)
    guides = {
        "lstm": Reader(nn.LSTM(3, 7, batch_first=True), 7),
        "gru both ways": Reader(nn.GRU(8, 5, batch_first=True, bidirectional=True), 10),
        "projected lstm": Reader(nn.LSTM(3, 7, batch_first=True, proj_size=2), 2),
        "narrow rnn": Reader(nn.RNN(9, 4, batch_first=True), 4),
    }
    return capture(guides[kind].eval(), vectors(2, 6, 3 if "lstm" in kind else 8 if "gru" in kind else 9))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("kind", "operators", "units"),
    [("lstm", "lstm", 7), ("gru both ways", "gru", 5), ("projected lstm", "lstm", 7), ("narrow rnn", "rnn_tanh", 4)],
)
def test_a_recurrence_is_replaced_at_its_own_width_and_told_by_its_name(kind, operators, units):
    (part,) = make_plan(reader(kind), "gru").parts
    (site,) = part.sites
    assert part.planned.operators == operators
    assert site.facts.recurrent_units == site.facts.features_width == units


def test_a_given_width_is_heeded():
    guide = reader("lstm")
    default, given, narrow = (
        make_plan(guide, target).plan.new_params for target in ("gru", Target("gru", width=7), Target("gru", width=3))
    )
    assert default == given > narrow
