"""Arithmetic on sizes that a file doesn't hold becomes what it holds: whole numbers by sums, products and quotients of
whole numbers, and a fraction that meets hidden states as a tensor without dimensions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.operators import names
from thesean.passes.graph.surgery import erase_dead

aten = torch.ops.aten

_LARGEST_POWER = 8  # n ** 8 is seven products

# On tensors what Python does with numbers. torch writes the root of a size as a function of its own.
_ON_TENSORS: dict[Any, Any] = {
    operator.pow: aten.pow.Tensor_Tensor, operator.mul: aten.mul.Tensor, operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor, operator.truediv: aten.div.Tensor, operator.neg: aten.neg.default,
    getattr(torch, "_sym_sqrt", None): aten.sqrt.default,
}  # fmt: skip
# Operators of a tensor of floats and a number, and which ones take a tensor in the number's place.
_MEETS: dict[Any, Any] = {
    aten.mul.Tensor: aten.mul.Tensor, aten.div.Tensor: aten.div.Tensor, aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor, aten.masked_fill.Scalar: aten.masked_fill.Tensor, aten.lt.Scalar: aten.lt.Tensor,
    aten.le.Scalar: aten.le.Tensor, aten.gt.Scalar: aten.gt.Tensor, aten.ge.Scalar: aten.ge.Tensor,
}  # fmt: skip


@dataclass(frozen=True)
class WriteOutSizes(Pass):
    """n ** 2  =>  n * n;  ceil(n / 2)  =>  (n + 1) // 2;  x * n ** e  =>  x * pow(tensor(n), e), on a size n."""

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        unknown = [n for n in graph.nodes if n.op == "call_function" and _is_number(n) and n.target not in names()]
        if not unknown:
            return PassResult.unchanged(graph_module, "all that is done with sizes can be saved")
        written = [_write_whole(n) if isinstance(n.meta["val"], torch.SymInt) else False for n in unknown]
        written += [_write_meeting(n) for n in list(graph.nodes) if n.target in _MEETS or n.target is aten.rsub.Scalar]
        if not any(written):
            return PassResult.unchanged(graph_module, "no other form is known")
        erase_dead(graph)
        return PassResult(graph_module=graph_module, modified=True)


def _is_number(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat))


def _is_whole(value: Any) -> bool:
    """A whole number, or a node that holds one."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _write_whole(node: fx.Node) -> bool:
    form = _FORMS.get(node.target)
    if form is None:
        return False
    with node.graph.inserting_before(node):
        made = form(_calls(node), *node.args, **node.kwargs)
    if made is None:
        return False
    node.replace_all_uses_with(made)
    return True


def _calls(beside: fx.Node) -> Callable[..., fx.Node]:
    """Makes nodes with their values, that belong where `beside` does."""

    def call(function: Callable[..., Any], *args: Any, **settings: Any) -> fx.Node:
        made = beside.graph.call_function(function, args, settings)
        made.meta = {"val": function(*fx.map_arg(args, lambda n: n.meta["val"]), **settings)}
        if "nn_module_stack" in beside.meta:
            made.meta["nn_module_stack"] = beside.meta["nn_module_stack"]
        return made

    return call


def _power(call: Callable[..., fx.Node], n: Any, exponent: Any) -> fx.Node | None:
    if not (isinstance(n, fx.Node) and type(exponent) is int and 1 <= exponent <= _LARGEST_POWER):
        return None
    product = n
    for _ in range(exponent - 1):
        product = call(operator.mul, product, n)
    return product


def _rounded(upwards: bool) -> Callable[..., fx.Node | None]:
    def form(call: Callable[..., fx.Node], quotient: Any) -> fx.Node | None:
        if quotient.target is not operator.truediv or not all(map(_is_whole, quotient.args)):
            return None
        n, m = quotient.args
        if upwards:  # not -(-n // m): ONNX divides towards zero
            if type(m) is not int or m < 1:
                return None
            n = call(operator.add, n, m - 1)
        return call(operator.floordiv, n, m)

    return form


def _shifted(by: Callable[[Any, Any], Any]) -> Callable[..., fx.Node | None]:
    return lambda call, n, k: call(by, n, 2**k) if isinstance(n, fx.Node) and type(k) is int else None


def _low_bits(call: Callable[..., fx.Node], n: Any, bits: Any) -> fx.Node | None:
    ones = type(bits) is int and bits >= 0 and bits & (bits + 1) == 0
    return call(operator.mod, n, bits + 1) if ones and isinstance(n, fx.Node) else None


_FORMS: dict[Any, Callable[..., fx.Node | None]] = {
    operator.pow: _power,
    math.floor: _rounded(upwards=False),
    math.ceil: _rounded(upwards=True),
    math.trunc: lambda call, n: call(torch.sym_int, n),
    operator.abs: lambda call, n: call(torch.sym_max, n, call(operator.neg, n)),
    operator.lshift: _shifted(operator.mul),
    operator.rshift: _shifted(operator.floordiv),
    operator.and_: _low_bits,
}


def _write_meeting(node: fx.Node) -> bool:
    """A number of the file's making in place of one that it doesn't hold: without dimensions it changes no type."""
    (x, *others) = node.args
    like = x.meta.get("val") if isinstance(x, fx.Node) else None
    number = others[-1] if others else None
    if not isinstance(like, torch.Tensor) or not like.is_floating_point() or not like.ndim or not _is_number(number):
        return False
    if all(n.target in names() for n in _made_of(number)):
        return False
    with detect_fake_mode(like) or nullcontext(), node.graph.inserting_before(node):
        # narrower floats don't hold every size
        made = _as_tensor(_calls(node), number, torch.float64 if like.dtype == torch.float64 else torch.float32)
    if made is None:
        return False
    if node.target is aten.rsub.Scalar:
        node.target, node.args = aten.sub.Tensor, (made, x)
    else:
        node.target, node.args = _MEETS[node.target], (x, *others[:-1], made)
    return True


def _made_of(number: Any) -> list[fx.Node]:
    """The arithmetic behind a number, itself in front."""
    front, found = [number], dict.fromkeys([number])
    while front:
        for source in front.pop().all_input_nodes:
            if _is_number(source) and source.op == "call_function" and source not in found:
                found[source] = None
                front.append(source)
    return list(found)


def _as_tensor(call: Callable[..., fx.Node], number: Any, dtype: torch.dtype) -> fx.Node | None:
    if isinstance(number, fx.Node) and number.target is torch.sym_float:
        return _as_tensor(call, number.args[0], dtype)
    if _is_whole(number) or isinstance(number, float):
        return call(aten.scalar_tensor.default, number, dtype=dtype)
    if not isinstance(number, fx.Node) or number.target not in _ON_TENSORS:
        return None
    values = [_as_tensor(call, value, dtype) for value in number.args]
    return None if None in values else call(_ON_TENSORS[number.target], *values)
