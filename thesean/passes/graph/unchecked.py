"""Operators that torch runs without a look at the sizes of all their arguments, and the look that it leaves out.

torch 2.13's fused attention on the CPU reads keys as far as there are values, and its LSTM reads weights and states as
far as it expects them to go: others end in memory that isn't theirs. Whole numbers divided end the process where the
processor can't hold the quotient. A graph from a file may hold all of it, so that a loaded network looks first,
whatever sizes it is called at.

B batch, T time, D width in, E width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from thesean.errors import ArtifactError

aten = torch.ops.aten


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> bool:
    floats = query.is_floating_point() and query.dtype == key.dtype == value.dtype
    return floats and key.shape[:-1] == value.shape[:-1] and query.shape[-1:] == key.shape[-1:]


def _cell(
    gates: int,
    x: torch.Tensor,
    state: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *settings: Any,
) -> bool:
    has_biases, num_layers, _dropout, _train, bidirectional, batch_first = settings
    ways = 1 + bidirectional
    states = [state] if isinstance(state, torch.Tensor) else list(state)
    if x.ndim != 3 or not states or states[0].ndim != 3 or num_layers < 1:
        return False
    batch = x.shape[0 if batch_first else 1]
    given, width = states[0].shape[-1], states[-1].shape[-1]  # what comes out of an LSTM may be projected
    projects = [(given, width)] * (given != width)
    expected: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        read = x.shape[-1] if layer == 0 else ways * given
        biases = [(gates * width,)] * (2 * has_biases)
        expected += ways * [(gates * width, read), (gates * width, given), *biases, *projects]
    sizes = [given] if gates != 4 else [given, width]
    return (
        [tuple(w.shape) for w in weights] == expected
        and [tuple(s.shape) for s in states] == [(num_layers * ways, batch, size) for size in sizes]
        and all(t.dtype == x.dtype for t in (*weights, *states))
    )


def _truncated(x: torch.Tensor, by: torch.Tensor | float, *, rounding_mode: str | None = None) -> bool:
    """The smallest whole number by -1 ends the process where it is truncated, and not where it is floored."""
    whole = not (x.is_floating_point() or (isinstance(by, torch.Tensor) and by.is_floating_point()))
    return rounding_mode != "trunc" or not whole or (not isinstance(by, torch.Tensor) and by != -1)


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> bool:
    """A length for each slice along `dim`; of nothing, torch divides by none."""
    lengths = [n if d == dim else 1 for d, n in enumerate(v.shape)]
    return v.numel() > 0 and -1 <= dim < v.ndim and (list(g.shape) == lengths or (dim == -1 and g.numel() == 1))


_FITS: dict[Callable[..., Any], Callable[..., bool]] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten._weight_norm.default: _weight_norm,
    aten.div.Tensor_mode: _truncated,
    aten.div.Scalar_mode: _truncated,
    aten.lstm.input: partial(_cell, 4),
    aten.gru.input: partial(_cell, 3),
    aten.rnn_tanh.input: partial(_cell, 1),
    aten.rnn_relu.input: partial(_cell, 1),
}


def check(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises ArtifactError where torch would read what isn't there."""
    fits = _FITS.get(target)
    if fits is not None and not fits(*args, **kwargs):
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        raise ArtifactError(f"{target}: the sizes of its tensors don't fit each other: {shapes}. The file was altered.")


def called(target: Callable[..., Any]) -> Callable[..., Any]:
    """The operator behind its look: what `look_first` writes into generated code in its place."""

    def looked(*args: Any, **kwargs: Any) -> Any:
        check(target, args, kwargs)
        return target(*args, **kwargs)

    return looked


def look_first(graph: fx.Graph) -> None:
    """Have the code that FX generates of this graph, and of its copies, look before such operators. In place."""
    names = [f"torch.ops.{target}" for target in _FITS]
    if not any(node.target in _FITS for node in graph.nodes):
        return

    def transform(body: list[str]) -> list[str]:
        for name in names:  # with its bracket: a call, and no operator of a longer name
            body = [line.replace(f"{name}(", f"_called({name})(") for line in body]
        return ["from thesean.passes.graph.unchecked import called as _called\n", *body]

    graph.on_generate_code(lambda _: transform)
