"""The module that stands in a graph for a guide's own recurrent cell that carries its state on.

B batch, T time, D width, E units
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from thesean.targets.shared.lookahead import InPlace
from thesean.targets.shared.torch_cell import run_cell

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class KeptCell(nn.Module):
    """x_BTD, (state_BE) -> y_BTE, state_BE after the last step; an LSTM's are two, h_BE and c_BE. They start as zeros.

    A step that `mask_BT` says is none leaves the state as it was. A cell that starts elsewhere, as it learnt to, says
    so by `start`, one row a state: the states are then how far the cell's own are from there.
    """

    stateful = True
    reads_mask = True

    def __init__(self, core: nn.RNNBase, start: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.core = core
        self.begins = len(start)
        for number, start_E in enumerate(start):
            self.register_buffer(f"start_{number}", start_E)

    def initial_state(self, x_BTD: torch.Tensor) -> State:
        units = self.core.hidden_size
        if self.core.mode != "LSTM":
            return x_BTD.new_zeros(x_BTD.shape[0], units)
        return x_BTD.new_zeros(x_BTD.shape[0], self.core.proj_size or units), x_BTD.new_zeros(x_BTD.shape[0], units)

    def forward(
        self, x_BTD: torch.Tensor, state: State | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        state = self.initial_state(x_BTD) if state is None else state
        before = state if isinstance(state, tuple) else (state,)
        starts = [getattr(self, f"start_{number}") for number in range(self.begins)]
        if starts:
            before = tuple(s + start_E for s, start_E in zip(before, starts, strict=True))
        given: Any = tuple(s.unsqueeze(0) for s in before)
        given = given if isinstance(state, tuple) else given[0]
        y_BTE, last = run_cell(self.core, x_BTD, given, None if mask is None else InPlace(mask))  # type: ignore[arg-type]
        after = tuple(s.squeeze(0) for s in (last if isinstance(last, tuple) else (last,)))
        if starts:
            after = tuple(s - start_E for s, start_E in zip(after, starts, strict=True))
        return y_BTE, after if isinstance(state, tuple) else after[0]


def cell_with(
    kind: str, tensors: list[torch.Tensor], has_biases: bool, bidirectional: bool, batch_first: bool
) -> nn.RNNBase:
    """One layer with these weights, in torch's own order."""
    per_direction = len(tensors) // (2 if bidirectional else 1)
    projected = per_direction % 2 == 1  # matrices and biases come in pairs; a projection is one more
    settings: dict[str, Any] = dict(bias=has_biases, bidirectional=bidirectional, batch_first=batch_first)
    if projected:
        settings["proj_size"] = tensors[per_direction - 1].shape[0]
    if kind.startswith("RNN"):
        settings["nonlinearity"] = kind.removeprefix("RNN_").lower()
    make = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(kind, nn.RNN)
    gates = {"LSTM": 4, "GRU": 3}.get(kind, 1)
    cell = make(tensors[0].shape[1], tensors[0].shape[0] // gates, **settings)
    with torch.no_grad():
        for parameter, value in zip(cell._flat_weights, tensors, strict=True):
            parameter.copy_(value)
    return cell.eval()
