"""nn.RNN, nn.GRU and nn.LSTM as ONNX RNN, GRU and LSTM: a guide's own cells, and those of elman, gru and lstm.

B batch, T time, D width, E units, N directions, L layers times directions
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thesean.deploy.lowering.lowered import require_exporting
from thesean.errors import ExportError

# torch's gate order -> ONNX's: GRU r,z,n -> z,r,n; LSTM i,f,g,o -> i,o,f,c
_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


class LoweredCell(nn.Module):
    """nn.RNN, nn.GRU or nn.LSTM, any layers and directions, as ONNX RNN, GRU or LSTM (one operator a layer).

    input (B, T, D) or (T, B, D) as the cell's batch_first says, hx (L, B, E) or None (zeros), and the lengths of the
    rows where they differ -> the cell's own outputs.
    """

    def __init__(self, cell: nn.RNNBase, path: str, opset: int) -> None:
        super().__init__()
        if cell.proj_size:
            raise ExportError(
                f"{path}: expected an LSTM without projections, found proj_size={cell.proj_size}, which ONNX's LSTM "
                f"doesn't have. Keep it out of the export, or replace it: {{{path!r}: 'gru'}}."
            )
        self.path = path
        self.kind = "RNN" if cell.mode.startswith("RNN") else cell.mode
        self.version = 22 if opset >= 22 else 14
        self.batch_first = cell.batch_first
        self.layers = cell.num_layers
        self.directions = 2 if cell.bidirectional else 1
        self.units = cell.hidden_size
        self.attributes: dict[str, Any] = {
            "hidden_size": cell.hidden_size,
            "direction": "bidirectional" if cell.bidirectional else "forward",
        }
        if self.kind == "GRU":
            self.attributes["linear_before_reset"] = 1  # torch resets after the recurrent product, not before
        if self.kind == "RNN":
            activation = "Tanh" if cell.mode == "RNN_TANH" else "Relu"
            self.attributes["activations"] = [activation] * self.directions
        for layer in range(cell.num_layers):
            self.register_buffer(f"input_{layer}", self._gates(cell, layer, "weight_ih"))
            self.register_buffer(f"recurrent_{layer}", self._gates(cell, layer, "weight_hh"))
            if cell.bias:
                biases = [self._gates(cell, layer, name) for name in ("bias_ih", "bias_hh")]
                self.register_buffer(f"bias_{layer}", torch.cat(biases, 1))
            else:
                self.register_buffer(f"bias_{layer}", None)

    def _gates(self, cell: nn.RNNBase, layer: int, name: str) -> torch.Tensor:
        """One weight of a layer, gates in ONNX's order, directions stacked in front."""
        suffixes = ("", "_reverse")[: self.directions]
        weights = [getattr(cell, f"{name}_l{layer}{suffix}").detach().split(self.units) for suffix in suffixes]
        return torch.stack([torch.cat([gates[i] for i in _GATES[self.kind]]) for gates in weights])

    def forward(
        self, input: torch.Tensor, hx: Any = None, lengths_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        require_exporting(self.path)
        if input.ndim != 3:
            raise ExportError(f"{self.path}: expected a batch of sequences (3 dimensions), found {input.ndim}.")
        is_lstm = self.kind == "LSTM"
        states = (hx if is_lstm else (hx,)) if hx is not None else ()
        x_TBD = input.transpose(0, 1) if self.batch_first else input
        lengths_B = None if lengths_B is None else lengths_B.to(torch.int32)
        lasts: list[list[torch.Tensor]] = [[] for _ in range(2 if is_lstm else 1)]
        for layer in range(self.layers):
            rows = slice(layer * self.directions, (layer + 1) * self.directions)
            x_TBD, *last = self._layer(layer, x_TBD, [state[rows] for state in states], lengths_B)
            for collected, state in zip(lasts, last, strict=True):
                collected.append(state)
        final = tuple(torch.cat(collected) if len(collected) > 1 else collected[0] for collected in lasts)
        return x_TBD.transpose(0, 1) if self.batch_first else x_TBD, final if is_lstm else final[0]

    def _layer(
        self, layer: int, x_TBD: torch.Tensor, states: list[torch.Tensor], lengths_B: torch.Tensor | None
    ) -> list[torch.Tensor]:
        T, B = x_TBD.shape[:2]
        weights = [getattr(self, f"{name}_{layer}") for name in ("input", "recurrent", "bias")]
        state_shape = [self.directions, B, self.units]
        shapes = [[T, *state_shape], *([state_shape] * len(_state_names(self.kind)))]
        y_TNBE, *last = torch.onnx.ops.symbolic_multi_out(
            self.kind,
            (x_TBD, *weights, lengths_B, *states),
            self.attributes,
            dtypes=[x_TBD.dtype] * len(shapes),
            shapes=shapes,
            version=self.version,
        )
        y = y_TNBE.squeeze(1) if self.directions == 1 else y_TNBE.transpose(1, 2).flatten(2)
        return [y, *last]


def _state_names(kind: str) -> tuple[str, ...]:
    return ("h", "c") if kind == "LSTM" else ("h",)


def lower(cell: nn.RNNBase, path: str, opset: int) -> LoweredCell:
    """Raises ExportError for an LSTM with projections."""
    return LoweredCell(cell, path, opset)
