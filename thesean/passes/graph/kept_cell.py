"""The module that stands in a graph for a guide's own recurrent cell that carries its state on.

B batch, T time, D width, E units
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thesean.targets.shared.lookahead import InPlace
from thesean.targets.shared.torch_cell import run_cell

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class KeptCell(nn.Module):
    """x_BTD, (state_BE) -> y_BTE, state_BE after the last step; an LSTM's are two, h_BE and c_BE. They start as zeros.

    A step that `mask_BT` says is none leaves the state as it was.
    """

    stateful = True
    reads_mask = True

    def __init__(self, core: nn.RNNBase) -> None:
        super().__init__()
        self.core = core

    def initial_state(self, x_BTD: torch.Tensor) -> State:
        units = self.core.hidden_size
        if self.core.mode != "LSTM":
            return x_BTD.new_zeros(x_BTD.shape[0], units)
        return x_BTD.new_zeros(x_BTD.shape[0], self.core.proj_size or units), x_BTD.new_zeros(x_BTD.shape[0], units)

    def forward(
        self, x_BTD: torch.Tensor, state: State | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        state = self.initial_state(x_BTD) if state is None else state
        start: Any = tuple(s.unsqueeze(0) for s in state) if isinstance(state, tuple) else state.unsqueeze(0)
        y_BTE, last = run_cell(self.core, x_BTD, start, None if mask is None else InPlace(mask))  # type: ignore[arg-type]
        return y_BTE, tuple(s.squeeze(0) for s in last) if isinstance(last, tuple) else last.squeeze(0)


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
