"""nn.RNN, nn.GRU and nn.LSTM as ONNX RNN, GRU and LSTM: a guide's own cells, and those of elman, gru and lstm.

B batch, T time, D width, E units, N directions, L layers times directions
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from thesean.deploy.lowering.in_torch import over_time
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
        self.states = 2 if self.kind == "LSTM" else 1
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
        states = () if hx is None else (hx,) if self.states == 1 else hx
        # onnxruntime 1.32 has these operators in float32 alone, and dies of a MatMul in float16 behind what turns them
        states = tuple(state.float() for state in states)
        x_TBD = (input.transpose(0, 1) if self.batch_first else input).float()
        lengths_B = None if lengths_B is None else lengths_B.to(torch.int32)
        lasts: list[list[torch.Tensor]] = [[] for _ in range(self.states)]
        for layer in range(self.layers):
            rows = slice(layer * self.directions, (layer + 1) * self.directions)
            x_TBD, *last = self._layer(layer, x_TBD, [state[rows] for state in states], lengths_B)
            for collected, state in zip(lasts, last, strict=True):
                collected.append(state)
        final = tuple((torch.cat(each) if len(each) > 1 else each[0]).to(input.dtype) for each in lasts)
        output = (x_TBD.transpose(0, 1) if self.batch_first else x_TBD).to(input.dtype)
        return output, final[0] if self.states == 1 else final

    def _layer(
        self, layer: int, x_TBD: torch.Tensor, states: list[torch.Tensor], lengths_B: torch.Tensor | None
    ) -> list[torch.Tensor]:
        T, B = x_TBD.shape[:2]
        weights = [getattr(self, f"{name}_{layer}") for name in ("input", "recurrent", "bias")]
        weights = [None if weight is None else weight.float() for weight in weights]
        state_shape = [self.directions, B, self.units]
        shapes = [[T, *state_shape], *([state_shape] * self.states)]
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


def lower(cell: nn.RNNBase, path: str, opset: int) -> LoweredCell:
    """Raises ExportError for an LSTM with projections."""
    return LoweredCell(cell, path, opset)


class ScannedCell(nn.Module):
    """The same cells as a scan of torch code: weights, arguments and results in torch's own order."""

    def __init__(self, cell: nn.RNNBase, path: str) -> None:
        super().__init__()
        self.path = path
        self.mode = cell.mode
        self.batch_first = cell.batch_first
        self.layers = cell.num_layers
        self.suffixes = ("", "_reverse")[: 2 if cell.bidirectional else 1]
        self.sizes = (cell.proj_size or cell.hidden_size, cell.hidden_size)[: 2 if cell.mode == "LSTM" else 1]
        for name, weight in cell.named_parameters():
            self.register_buffer(name, weight.detach().clone())

    def forward(
        self, input: torch.Tensor, hx: Any = None, lengths_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        if input.ndim != 3:
            raise ExportError(f"{self.path}: expected a batch of sequences (3 dimensions), found {input.ndim}.")
        x_TBD = input.transpose(0, 1) if self.batch_first else input
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        if hx is None:
            number = self.layers * len(self.suffixes)
            states = tuple(x_TBD.new_zeros(number, x_TBD.shape[1], size) for size in self.sizes)
        seen_TB1 = None
        if lengths_B is not None:
            seen_TB1 = (torch.arange(x_TBD.shape[0]).unsqueeze(1) < lengths_B).unsqueeze(-1)
        lasts: list[tuple[torch.Tensor, ...]] = []
        for layer in range(self.layers):
            outs = []
            for suffix in self.suffixes:
                out_TBE, last = self._run(f"l{layer}{suffix}", x_TBD, tuple(s[len(lasts)] for s in states), seen_TB1)
                lasts.append(last)
                outs.append(out_TBE)
            x_TBD = torch.cat(outs, -1)
        final = tuple(torch.stack(each) for each in zip(*lasts, strict=True))
        return x_TBD.transpose(0, 1) if self.batch_first else x_TBD, final if self.mode == "LSTM" else final[0]

    def _run(
        self, name: str, x_TBD: torch.Tensor, state: tuple[torch.Tensor, ...], seen_TB1: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """One layer in one direction; where a row is over, its state stays and nothing comes out."""
        backwards = name.endswith("_reverse")
        drive_TBE = F.linear(x_TBD, getattr(self, f"weight_ih_{name}"), getattr(self, f"bias_ih_{name}", None))
        inputs_T: tuple[torch.Tensor, ...] = (drive_TBE,) if seen_TB1 is None else (drive_TBE, seen_TB1)
        if backwards:
            inputs_T = tuple(x.flip(0) for x in inputs_T)

        def step(
            before: tuple[torch.Tensor, ...], at_t: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            after = self._step(name, at_t[0], before)
            if seen_TB1 is None:
                return after[0], after
            seen_B1 = at_t[1]
            after = tuple(torch.where(seen_B1, new, old) for new, old in zip(after, before, strict=True))
            return after[0] * seen_B1, after

        out_TBE, last = over_time(step, state, inputs_T)
        return out_TBE.flip(0) if backwards else out_TBE, last

    def _step(self, name: str, drive_BE: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The equations of torch's nn.RNN, nn.GRU and nn.LSTM."""
        hidden_BE = state[0]
        read_BE = F.linear(hidden_BE, getattr(self, f"weight_hh_{name}"), getattr(self, f"bias_hh_{name}", None))
        if self.mode == "GRU":
            (reset, update, new), (reset_too, update_too, new_too) = drive_BE.chunk(3, -1), read_BE.chunk(3, -1)
            candidate = torch.tanh(new + torch.sigmoid(reset + reset_too) * new_too)
            return (torch.lerp(candidate, hidden_BE, torch.sigmoid(update + update_too)),)
        if self.mode == "LSTM":
            taken, forgotten, new, shown = (drive_BE + read_BE).chunk(4, -1)
            cell_BE = torch.sigmoid(forgotten) * state[1] + torch.sigmoid(taken) * torch.tanh(new)
            hidden_BE = torch.sigmoid(shown) * torch.tanh(cell_BE)
            projection = getattr(self, f"weight_hr_{name}", None)
            return hidden_BE if projection is None else hidden_BE @ projection.mT, cell_BE
        return (torch.tanh(drive_BE + read_BE) if self.mode == "RNN_TANH" else torch.relu(drive_BE + read_BE),)


def in_torch(cell: nn.RNNBase, path: str) -> ScannedCell:
    return ScannedCell(cell, path)
