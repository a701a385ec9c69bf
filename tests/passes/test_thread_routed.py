"""Tokens that are sorted by the expert that they go to, and sorted back, come in chunks as well.

B batch, T time, D width, N tokens of all rows
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.models import VOCABULARY, seeded, tokens
from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import run_in_chunks
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.carry_cells import CarryCells
from thesean.passes.thread_state import ThreadState, zero_states

EXPERTS = 3


class Routed(nn.Module):
    """ids_BT -> logits_BTV by a recurrent cell and experts. `room`: of an expert's tokens those behind it get nothing;
    `sorts`: the steps of each feature are put in order instead.
    """

    def __init__(self, room: int | None = None, sorts: bool = False) -> None:
        super().__init__()
        self.room, self.sorts = room, sorts
        self.words, self.cell = nn.Embedding(VOCABULARY, 8), nn.GRU(8, 8, batch_first=True)
        self.gate, self.scale_ED = nn.Linear(8, EXPERTS), nn.Parameter(torch.randn(EXPERTS, 8))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD, _ = self.cell(self.words(ids_BT))
        return self.head(x_BTD + (x_BTD.sort(1).values if self.sorts else self.routed(x_BTD)))

    def routed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_ND = x_BTD.flatten(0, 1)
        expert_N, order_N = self.gate(x_ND).argmax(-1).sort(stable=True)
        y_ND = torch.tanh(x_ND[order_N] * self.scale_ED[expert_N])
        if self.room is not None:
            same_NN = (expert_N.unsqueeze(0) == expert_N.unsqueeze(1)).tril(-1)
            y_ND = y_ND * (same_NN.sum(1) < self.room).unsqueeze(1)
        return torch.zeros_like(x_ND).index_add(0, order_N, y_ND).view_as(x_BTD)


def threaded(*settings: Any) -> tuple[Captured, fx.GraphModule]:
    guide = capture(seeded(Routed, *settings), tokens(2, 9))
    carried = CarryCells(guide.signature)(guide.graph_module).graph_module
    return guide, ThreadState(guide.signature)(carried).graph_module


def test_experts_of_sorted_tokens_are_a_stream():
    guide, found = threaded()
    inputs = {"ids_BT": tokens(2, 11)}
    with torch.no_grad():
        pieces, _ = run_in_chunks(found, guide.signature, inputs, zero_states(found, 2), (1, 3, 5, 2))
        whole = guide.graph_module(**inputs)
    torch.testing.assert_close(torch.cat([piece[0] for piece in pieces], 1), whole, rtol=1e-4, atol=1e-5)
    assert found.meta["rows_are_alone"]


def test_an_expert_with_room_for_some_tokens_is_none():
    """That a token gets nothing is seen where many go to one expert, in few sequences that are drawn at random."""
    with pytest.raises(PassRefused, match="isn't the whole sequence's"):
        threaded(12)


def test_steps_that_are_put_in_order_are_none():
    with pytest.raises(PassRefused, match=r"sort.* mixes time"):
        threaded(None, True)
