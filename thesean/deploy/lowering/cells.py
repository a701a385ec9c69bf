"""The modules that stand in for recurrent cells while exporting: same signatures, ONNX operators inside.

B batch, T time, D width, E units, N directions, L layers times directions, H heads, G heads of keys and values,
F features, K width of a value
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._higher_order_ops import scan  # the operator that the exporter turns into ONNX Scan; no public name yet
from torch.nn import functional as F

from thesean.errors import ExportError

# torch's gate order -> ONNX's: GRU r,z,n -> z,r,n; LSTM i,f,g,o -> i,o,f,c
_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


def require_exporting(path: str) -> None:
    """Outside an export the symbolic operators return zeros without a word: refuse instead."""
    if not torch.compiler.is_exporting():
        raise ExportError(
            f"{path or 'module'}: a lowered cell ran outside an export. Run the module it was lowered from."
        )


class LoweredCell(nn.Module):
    """nn.RNN, nn.GRU or nn.LSTM, any layers and directions, as ONNX RNN, GRU or LSTM (one operator a layer).

    input (B, T, D) or (T, B, D) as the cell's batch_first says, hx (L, B, E) or None (zeros) -> the cell's own outputs.
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

    def forward(self, input: torch.Tensor, hx: Any = None) -> tuple[torch.Tensor, Any]:
        require_exporting(self.path)
        if input.ndim != 3:
            raise ExportError(f"{self.path}: expected a batch of sequences (3 dimensions), found {input.ndim}.")
        is_lstm = self.kind == "LSTM"
        states = (hx if is_lstm else (hx,)) if hx is not None else ()
        x_TBD = input.transpose(0, 1) if self.batch_first else input
        lasts: list[list[torch.Tensor]] = [[] for _ in range(2 if is_lstm else 1)]
        for layer in range(self.layers):
            rows = slice(layer * self.directions, (layer + 1) * self.directions)
            x_TBD, *last = self._layer(layer, x_TBD, [state[rows] for state in states])
            for collected, state in zip(lasts, last, strict=True):
                collected.append(state)
        final = tuple(torch.cat(collected) if len(collected) > 1 else collected[0] for collected in lasts)
        return x_TBD.transpose(0, 1) if self.batch_first else x_TBD, final if is_lstm else final[0]

    def _layer(self, layer: int, x_TBD: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
        T, B = x_TBD.shape[:2]
        weights = [getattr(self, f"{name}_{layer}") for name in ("input", "recurrent", "bias")]
        state_shape = [self.directions, B, self.units]
        shapes = [[T, *state_shape], *([state_shape] * len(_state_names(self.kind)))]
        y_TNBE, *last = torch.onnx.ops.symbolic_multi_out(
            self.kind,
            (x_TBD, *weights, None, *states),  # None: no sequence lengths
            self.attributes,
            dtypes=[x_TBD.dtype] * len(shapes),
            shapes=shapes,
            version=self.version,
        )
        y = y_TNBE.squeeze(1) if self.directions == 1 else y_TNBE.transpose(1, 2).flatten(2)
        return [y, *last]


def _state_names(kind: str) -> tuple[str, ...]:
    return ("h", "c") if kind == "LSTM" else ("h",)


class LoweredLinearRecurrence(nn.Module):
    """LinearRecurrence as ONNX Scan: exact at any length.

    Faster than its other exact forms in onnxruntime 1.32 (width 256, 1 thread, T=2048: Scan 6.6 ms; LinearAttention
    with one head a unit, which rounds through a logarithm, 12 ms; an LSTM with identity activations 64 ms).
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self, decay_BTD: torch.Tensor, input_BTD: torch.Tensor, state_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_exporting(self.path)

        def step(hidden_BD: torch.Tensor, at_t: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            decay_BD, input_BD = at_t
            hidden_BD = decay_BD * hidden_BD + input_BD
            return hidden_BD, hidden_BD.clone()  # scan forbids outputs that share memory

        last_BD, hidden_TBD = scan(step, state_BD, (decay_BTD.transpose(0, 1), input_BTD.transpose(0, 1)))
        return hidden_TBD.transpose(0, 1), last_BD


class LoweredLinearAttention(nn.Module):
    """LinearAttentionCore as com.microsoft::LinearAttention, whose heads are packed into the last dimension.

    onnxruntime 1.32 has a fast CPU path for values of width 32 and 64 and features in multiples of 16; elsewhere it is
    up to 50 times slower (4 heads, F = 64, T = 512, one thread: 0.35 ms at K = 32, 20 ms at K = 33). The columns of the
    values do not see each other, so they are cut into blocks of those widths, the last one padded with zeros.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self,
        query_BTHF: torch.Tensor,
        key_BTGF: torch.Tensor,
        value_BTGK: torch.Tensor,
        log_decay_BTG: torch.Tensor | None,
        state_BGFK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_exporting(self.path)
        return linear_attention_operator(query_BTHF, key_BTGF, value_BTGK, log_decay_BTG, None, state_BGFK)


def linear_attention_operator(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One com.microsoft::LinearAttention for each block of the values. The decay is one a head (B, T, G), one a feature
    (B, T, G, F), or none; with a decay and `beta_BTG` the delta rule updates the state, whose columns do not see each
    other either.
    """
    features = query_BTHF.shape[-1]
    missing = -features % 16
    if missing:
        query_BTHF, key_BTGF = F.pad(query_BTHF, (0, missing)), F.pad(key_BTGF, (0, missing))
        if log_decay is not None and log_decay.ndim == 4:
            log_decay = F.pad(log_decay, (0, missing))
    outs, states, start = [], [], 0
    for width, padded in value_blocks(value_BTGK.shape[-1]):
        block = slice(start, start + width)
        value, state = value_BTGK[..., block], state_BGFK[..., block]
        if missing or padded > width:
            value, state = F.pad(value, (0, padded - width)), F.pad(state, (0, padded - width, 0, missing))
        out, state = _linear_attention(query_BTHF, key_BTGF, value, log_decay, beta_BTG, state)
        outs.append(out[..., :width])
        states.append(state[:, :, :features, :width])
        start += width
    return (outs[0], states[0]) if len(outs) == 1 else (torch.cat(outs, -1), torch.cat(states, -1))


def value_blocks(width: int) -> list[tuple[int, int]]:
    """(columns, padded columns) that cover `width`: 64 at a time, then 32 or 64; a single last one as it is."""
    blocks = [(64, 64)] * (width // 64)
    rest = width % 64
    if rest > 32 and rest - 32 == 1:
        return [*blocks, (32, 32), (1, 1)]
    if rest:
        blocks.append((rest, 1 if rest == 1 else 32 if rest <= 32 else 64))
    return blocks


def _linear_attention(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, H, features = query_BTHF.shape
    G, K = value_BTGK.shape[2:]
    inputs = [query_BTHF.flatten(2), key_BTGF.flatten(2), value_BTGK.flatten(2), state_BGFK]
    inputs += [gate.flatten(2) for gate in (log_decay, beta_BTG) if gate is not None]
    rule = "linear" if log_decay is None else "gated" if beta_BTG is None else "gated_delta"
    out, state_BGFK = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        inputs,
        {
            "q_num_heads": H,
            "kv_num_heads": G,
            "scale": 1.0,  # 0 would mean 1 / sqrt(F)
            "update_rule": rule,
        },
        dtypes=[query_BTHF.dtype] * 2,
        shapes=[[B, T, H * K], [B, G, features, K]],
        version=1,
    )
    return out.unflatten(-1, (H, K)), state_BGFK
