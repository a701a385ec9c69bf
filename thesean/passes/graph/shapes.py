"""Shapes and dtypes of what operators give on the meta device, without torch's compiler.

torch 2.13 finds them by its references in Python, which import the compiler: two seconds, where a folder loads in one
twentieth of one. What the networks here are made of is said here; all else goes torch's way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Shapes(TorchDispatchMode):
    """Inside, an operator on meta tensors is answered by the rules below where one is for it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it is to import it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            return rule(func, *args, **kwargs)
        if func in _DRAWS:  # a constructor's first weights
            return args[0]
        if torch.Tag.pointwise in func.tags:
            return _pointwise(func, *args, **kwargs)
        return func(*args, **kwargs)


def _meta(shape: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta")


def _small(tensor: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """A real one of its dtype and rank: which dtypes go together, and what they give, the operator itself knows."""
    return torch.ones([1] * (tensor.ndim if rank is None else rank), dtype=tensor.dtype)


def _pointwise(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if all(t.device.type != "meta" for t in given):  # numbers, such as sizes that stand in tensors for a while
        return func(*args, **kwargs)
    small = pytree.tree_map_only(torch.Tensor, _small, (args, kwargs))
    shape, result = _broadcast(*(t.shape for t in given)), func(*small[0], **small[1])
    if not func._schema.is_mutable:
        return _meta(shape, result)
    _expect(shape == args[0].shape, f"{func} writes {tuple(shape)} into {tuple(args[0].shape)}")
    return args[0]


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """torch's own imports sympy: most of a second."""
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True)
    found = []
    for column in columns:
        sizes = set(column) - {1}
        _expect(len(sizes) <= 1, f"{[tuple(s) for s in shapes]} don't broadcast")
        found.append(sizes.pop() if sizes else 1)
    return tuple(found)


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise RuntimeError(what)


def _cat(func: Any, tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    kept = [t for t in tensors if t.shape != (0,)]  # which torch lets pass, whatever the others' rank
    first = kept[0] if kept else tensors[0]
    _expect(-first.ndim <= dim < first.ndim, f"cat has no dimension {dim}")
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in kept if t.ndim == first.ndim)
    for t in kept:
        alike = t.ndim == first.ndim and all(
            a == b for d, (a, b) in enumerate(zip(t.shape, shape, strict=True)) if d != dim % first.ndim
        )
        _expect(alike, f"cat of {[tuple(t.shape) for t in tensors]} along {dim}")
    return _meta(shape, func([_small(t, 1) for t in tensors]))


def _addmm(func: Any, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **scales: Any) -> torch.Tensor:
    _expect(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0], f"addmm of {tuple(a.shape)} and {tuple(b.shape)}")
    shape = (a.shape[0], b.shape[1])
    _expect(_broadcast(bias.shape, shape) == shape, f"addmm adds {tuple(bias.shape)} to {shape}")
    return _meta(shape, func(_small(bias), _small(a), _small(b), **scales))


def _layer_norm(
    func: Any, x: torch.Tensor, over: list[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, ...]:
    rank = x.ndim - len(over)
    _expect(
        len(over) > 0 and rank >= 0 and list(x.shape[rank:]) == list(over), f"layer_norm of {tuple(x.shape)} {over}"
    )
    affine = [t for t in (weight, bias) if t is not None]
    _expect(all(list(t.shape) == list(over) for t in affine), f"layer_norm over {over} scales otherwise")
    small = [None if t is None else _small(t) for t in (weight, bias)]
    outs = func(_small(x), [1] * len(over), *small, eps)
    shapes = (x.shape, [*x.shape[:rank], *[1] * len(over)], [*x.shape[:rank], *[1] * len(over)])
    return tuple(_meta(s, o) for s, o in zip(shapes, outs, strict=True))


def _cumulated(func: Any, x: torch.Tensor, dim: int, **dtype: Any) -> torch.Tensor:
    return _meta(x.shape, func(_small(x), *([dim] if x.ndim else [0]), **dtype))


def _reduced(func: Any, x: torch.Tensor, dim: Any = None, keepdim: bool = False, **dtype: Any) -> torch.Tensor:
    small = func(_small(x), dim or [], keepdim, **dtype)  # which checks the dimensions
    gone = {d % max(x.ndim, 1) for d in dim or range(x.ndim)}
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return _meta(shape, small)


def _stack(func: Any, tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    _expect(len({t.shape for t in tensors}) == 1, f"stack of {[tuple(t.shape) for t in tensors]}")
    small = func([_small(t) for t in tensors], dim)  # which checks the dimension
    shape = list(tensors[0].shape)
    shape.insert(dim % small.ndim, len(tensors))
    return _meta(shape, small)


def _group_norm(func: Any, x: torch.Tensor, weight: Any, bias: Any, *sizes: Any) -> tuple[torch.Tensor, ...]:
    n, channels, rest, groups, _eps = sizes
    _expect(groups > 0 and channels % groups == 0 and n * channels * rest == x.numel(), "group_norm doesn't fit")
    _expect(all(t is None or t.shape == (channels,) for t in (weight, bias)), "group_norm scales otherwise")
    return _meta(x.shape, x), _meta((n, groups), x), _meta((n, groups), x)


def _batch_norm(
    func: Any, x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *numbers: float
) -> tuple[torch.Tensor, ...]:
    given = [t for t in (weight, bias, mean, var) if t is not None]
    _expect(x.ndim >= 2 and all(t.shape == x.shape[1:2] for t in given), "batch_norm scales otherwise")
    kept = (x.shape[1] if training else 0,)
    return _meta(x.shape, x), _meta(kept, x), _meta(kept, x)


def _arange(func: Any, *numbers: float, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
    start, end, step = (0, *numbers, 1) if len(numbers) == 1 else (*numbers, 1)[:3]
    _expect(all(map(math.isfinite, (start, end))) and step != 0 and (end - start) / step >= 0, f"arange of {numbers}")
    count = math.ceil((end - start) / step)
    kind = torch.int64 if all(isinstance(n, int) for n in numbers) else torch.get_default_dtype()
    return torch.empty(count, dtype=dtype or kind, device=device)


def _product(func: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """mm and bmm."""
    rank = 2 if func is aten.mm.default else 3
    fits = a.ndim == b.ndim == rank and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    _expect(fits, f"a product of {tuple(a.shape)} and {tuple(b.shape)}")
    return _meta((*a.shape[:-1], b.shape[-1]), func(_small(a), _small(b)))


def _repeat(func: Any, x: torch.Tensor, times: list[int]) -> torch.Tensor:
    _expect(len(times) >= x.ndim and min(times, default=0) >= 0, f"repeat of {tuple(x.shape)} by {times}")
    return _meta((n * t for n, t in zip((*[1] * (len(times) - x.ndim), *x.shape), times, strict=True)), x)


def _embedding(func: Any, table: torch.Tensor, indices: torch.Tensor, *options: Any) -> torch.Tensor:
    _expect(table.ndim == 2 and indices.dtype in (torch.int64, torch.int32), "embedding doesn't fit")
    return _meta((*indices.shape, table.shape[1]), table)


def _flip(func: Any, x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    return _meta(x.shape, func(_small(x), dims))


def _linspace(
    func: Any, start: float, end: float, steps: int, *, dtype: Any = None, device: Any = None, **_: Any
) -> Any:
    return torch.empty(steps, dtype=dtype, device=device)


def _eye(func: Any, n: int, m: int | None = None, *, dtype: Any = None, device: Any = None, **rest: Any) -> Any:
    return torch.empty((n, n if m is None else m), dtype=dtype, device=device)


_DRAWS = {aten.normal_.default, aten.uniform_.default, aten.fill_.Scalar, aten.zero_.default}
_RULES: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.addmm.default: _addmm,
    aten.native_layer_norm.default: _layer_norm,
    aten.stack.default: _stack,
    aten.native_group_norm.default: _group_norm,
    aten.cumsum.default: _cumulated,
    aten._safe_softmax.default: _cumulated,
    aten.tril.default: lambda func, x, diagonal=0: _meta(x.shape, func(torch.ones(1, 1, dtype=x.dtype))),
    aten.native_batch_norm.default: _batch_norm,
    aten.linalg_vector_norm.default: lambda func, x, ord=2, dim=None, keepdim=False, **dtype: _reduced(
        lambda small, *how, **kind: func(small, ord, *how, **kind), x, dim, keepdim, **dtype
    ),
    aten.roll.default: lambda func, x, shifts, dims=(): _meta(x.shape, func(_small(x), shifts, dims)),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.zeros_like.default: lambda func, x, *, dtype=None, **_: torch.empty_like(x, dtype=dtype),
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.repeat.default: _repeat,
    aten.embedding.default: _embedding,
    aten.flip.default: _flip,
    aten._softmax.default: lambda func, x, dim, half: _meta(x.shape, func(_small(x), dim, half)),
    aten.amax.default: _reduced,
    aten.arange.start_step: _arange,
    aten.linspace.default: _linspace,
    aten.logspace.default: lambda func, start, end, steps, base=10.0, **kind: _linspace(
        func, start, end, steps, **kind
    ),
    aten.eye.default: _eye,
    aten.eye.m: _eye,
    aten.polar.default: _pointwise,
    aten.mean.dim: _reduced,
    aten.sum.dim_IntList: _reduced,
}
