"""What is done with complex tensors, done with the pairs of numbers that they are.

Torch's exporter has forms of products and sums of complex numbers, and of few operators that only move them about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from thesean.passes.graph.nodes import is_complex

aten = torch.ops.aten


def pairs_form(node: fx.Node) -> Callable[..., Any] | None:
    """The same of pairs for an operator on a complex tensor; None where there is none, or it isn't on one."""
    form = _PAIRS.get(node.target)
    first = next(iter(node.args), None)
    return form if form is not None and isinstance(first, fx.Node) and is_complex(first) else None


def _moved(move: Callable[..., Any]) -> Callable[..., Any]:
    """Of pairs whose last dimension is the two numbers; `move` is told how many others there are."""

    @wraps(move)
    def of_complex(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = move(torch.view_as_real(x), x.ndim, *args, **kwargs)
        return pytree.tree_map(lambda r: torch.view_as_complex(r.contiguous()), made)

    return of_complex


def _exp(x: torch.Tensor) -> torch.Tensor:
    return torch.polar(x.real.exp(), x.imag)


# operator -> what it does with pairs; their own dimension is counted by no index from the end
_MOVES: Mapping[Any, Callable[..., Any]] = {
    aten.unsqueeze.default: lambda r, n, dim: r.unsqueeze(dim % (n + 1)),
    aten.squeeze.dims: lambda r, n, dims: r.squeeze(tuple(d % n for d in dims)),
    aten.select.int: lambda r, n, dim, index: r.select(dim % n, index),
    aten.narrow.default: lambda r, n, dim, start, length: r.narrow(dim % n, start, length),
    aten.index_select.default: lambda r, n, dim, index: r.index_select(dim % n, index),
    aten.index.Tensor: lambda r, n, indices: r[tuple(slice(None) if i is None else i for i in indices)],
    aten.embedding.default: lambda r, n, ids, *_: r[ids],
    aten.expand.default: lambda r, n, sizes, **_: r.expand(*sizes, 2),
    aten.reshape.default: lambda r, n, sizes: r.reshape(*sizes, 2),
    aten.view.default: lambda r, n, sizes: r.reshape(*sizes, 2),
    aten._unsafe_view.default: lambda r, n, sizes: r.reshape(*sizes, 2),
    aten.flatten.using_ints: lambda r, n, start=0, end=-1: r.flatten(start % n, end % n),
    aten.unflatten.int: lambda r, n, dim, sizes: r.unflatten(dim % n, tuple(sizes)),
    aten.movedim.int: lambda r, n, source, to: r.movedim(source % n, to % n),
    aten.repeat.default: lambda r, n, times: r.repeat(*times, 1),
    aten.repeat_interleave.self_int: lambda r, n, times, dim, **_: r.repeat_interleave(times, dim % n),
    aten.cumsum.default: lambda r, n, dim, **_: r.cumsum(dim % n),
    aten.constant_pad_nd.default: lambda r, n, pad, value=0: F.pad(r, (0, 0, *pad), value=value),
    aten.contiguous.default: lambda r, n, **_: r,
    aten.split.Tensor: lambda r, n, size, dim=0: r.split(size, dim % n),
    aten.split_with_sizes.default: lambda r, n, sizes, dim=0: r.split(tuple(sizes), dim % n),
    aten.chunk.default: lambda r, n, count, dim=0: r.chunk(count, dim % n),
    aten.unbind.int: lambda r, n, dim=0: r.unbind(dim % n),
}
_PAIRS: Mapping[Any, Callable[..., Any]] = {
    **{target: _moved(move) for target, move in _MOVES.items()},
    aten.exp.default: _exp,
}
