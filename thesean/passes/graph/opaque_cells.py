"""Recurrent cells stay one operator while a guide is traced; taken apart, their loop over time fixes the length.

A guide's cell becomes one node a layer, batch first, `aten.lstm`, `aten.gru`, `aten.rnn_tanh` or `aten.rnn_relu`:
operators that run, train and save like any other.

B batch, T time, D width, E units, L layers times directions
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_KINDS: dict[Callable[..., Any], str] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
CELLS: dict[Any, str] = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN_TANH",
    aten.rnn_relu.input: "RNN_RELU",
}
OPERATORS = {
    "lstm": aten.lstm.input, "gru": aten.gru.input, "rnn_tanh": aten.rnn_tanh.input, "rnn_relu": aten.rnn_relu.input
}  # fmt: skip


@torch.library.custom_op("thesean::recurrent", mutates_args=())
def _recurrent(
    x: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    kind: str,
    has_biases: bool,
    layers: int,
    bidirectional: bool,
) -> list[torch.Tensor]:
    """x_BTD -> [y_BTE, last state(s) LBE]; only ever traced."""
    given = list(states) if kind == "lstm" else states[0]
    out = OPERATORS[kind](x, given, list(weights), has_biases, layers, 0.0, False, bidirectional, True)
    return [v.clone() for v in out]


@_recurrent.register_fake
def _(x: torch.Tensor, states: list[torch.Tensor], *settings: Any) -> list[torch.Tensor]:
    """`settings` end with `bidirectional`."""
    # a projected LSTM puts out the width of its first state, not of its cell
    width = states[0].shape[-1] * (2 if settings[-1] else 1)
    return [x.new_empty(x.shape[0], x.shape[1], width), *[torch.empty_like(s) for s in states]]


class OpaqueCells(TorchFunctionMode):
    """Inside, batched recurrent calls are one operator each; packed sequences are left as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = _KINDS.get(func)
        # batched: (input, hx, weights, has_biases, layers, dropout, train, bidirectional, batch_first)
        if kind is None or kwargs or len(args) != 9 or not isinstance(args[3], bool):
            return func(*args, **(kwargs or {}))
        x, states, weights, has_biases, layers, _, _, bidirectional, batch_first = args
        states = list(states) if kind == "lstm" else [states]
        x_BTD = x if batch_first else x.transpose(0, 1)
        y, *last = torch.ops.thesean.recurrent(x_BTD, states, list(weights), kind, has_biases, layers, bidirectional)
        return (y if batch_first else y.transpose(0, 1), *last)
