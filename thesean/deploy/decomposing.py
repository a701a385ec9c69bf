"""Whether an exported graph has to be traced a second time.

`torch.onnx.export` traces each program anew to decompose what ONNX has no form of: half of what an export takes. The
graphs that come here consist of operators that have one, with few exceptions, and would come out as they went in.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.nodes import argument

aten = torch.ops.aten

_DECOMPOSE = "decompose_with_registry"

# Aliases, which torch always decomposes: one ONNX Reshape each, whatever the memory behind them
_RESHAPES = {aten.flatten.using_ints, aten.unflatten.int, aten.reshape.default}

_DENSE = {"memory_format": torch.contiguous_format}

# What torch decomposes to one other operator: that one, with which arguments
_RENAMED: dict[Any, Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    aten.__and__.Tensor: lambda a, b: (aten.bitwise_and.Tensor, (a, b), {}),
    aten.__or__.Tensor: lambda a, b: (aten.bitwise_or.Tensor, (a, b), {}),
    aten.contiguous.default: lambda a, **_: (aten.clone.default, (a,), _DENSE),
    aten.max.other: lambda a, b: (aten.maximum.default, (a, b), {}),
    aten.min.other: lambda a, b: (aten.minimum.default, (a, b), {}),
    aten.mT.default: lambda a: (aten.transpose.int, (a, -2, -1), {}),
    aten.square.default: lambda a: (aten.pow.Tensor_Scalar, (a, 2), {}),
    aten.to.device: lambda a, device, dtype, *_, **__: (aten._to_copy.default, (a,), {"dtype": dtype}),
    aten.to.dtype: lambda a, dtype, *_, **__: (aten._to_copy.default, (a,), {"dtype": dtype}),
}

# Erased by the exporter itself
_CHECKS = {aten._assert_scalar.default, aten._assert_tensor_metadata.default, aten.sym_constrain_range_for_size.default}


@dataclass(frozen=True)
class _Times:
    """A size that is a number times another one."""

    once: fx.Node | tuple[fx.Node, int]
    value: torch.SymInt = field(compare=False)  # of that
    factor: int


@contextmanager
def decomposed_where_needed() -> Iterator[None]:
    """Exports inside trace a program a second time only where that would change it."""
    module, original = _exporter()
    if module is None:
        yield
        return

    def decompose(program: Any, registry: Any) -> Any:
        kept = keep_operators(program.graph_module, registry.is_registered)
        return program if kept else original(program, registry)

    setattr(module, _DECOMPOSE, decompose)
    try:
        yield
    finally:
        setattr(module, _DECOMPOSE, original)


@cache
def _exporter() -> tuple[Any, Any]:
    """torch's module and its function as it was; None where a torch has them elsewhere: exports take longer there.

    Until torch decides so itself: 2.13 traces always, and no public argument prevents it.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes
    except ImportError:
        return None, None
    original = getattr(_fx_passes, _DECOMPOSE, None)
    return (None, None) if original is None else (_fx_passes, original)


def keep_operators(graph_module: fx.GraphModule, has_form: Callable[[Any], bool]) -> bool:
    """Whether all operators, in bodies of loops too, have an ONNX form and none that torch would decompose is left.

    Where that is so flattening and its kin have become views of the sizes that they give, and a few more what torch
    decomposes them to; where it is not the graph stays as it was.
    """
    graphs = [m.graph for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
    for graph in graphs:
        graph.eliminate_dead_code()
    nodes = [n for graph in graphs for n in graph.nodes if n.op == "call_function"]
    if not all(_is_known(n) or stays(n.target, has_form) for n in nodes):
        return False
    sizes = {n: _sizes(n) for n in nodes if n.target in _RESHAPES}
    if None in sizes.values():
        return False
    read: dict[Any, fx.Node] = {}
    for node in nodes:
        if node in sizes:
            _write_view(node, sizes[node] or [], read)
        elif node.target in _RENAMED:
            node.target, node.args, node.kwargs = _RENAMED[node.target](*node.args, **node.kwargs)
        elif node.target in _WRITTEN_OUT:
            _, write = _WRITTEN_OUT[node.target]
            write(node)
    return True


def _is_known(node: fx.Node) -> bool:
    """Whether it is rewritten here."""
    if node.target in _WRITTEN_OUT:
        can_be_written, _ = _WRITTEN_OUT[node.target]
        return can_be_written(node)
    return node.target in _RESHAPES or node.target in _RENAMED


def stays(target: Any, has_form: Callable[[Any], bool]) -> bool:
    """Whether torch's decompositions leave it alone: a function of sizes, a loop, or an operator of known form that
    neither writes nor is composed of others behind an alias.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return target is torch.ops.higher_order.scan or not isinstance(target, torch._ops.OperatorBase)
    if target in _CHECKS or target.namespace == "onnx_symbolic":
        return True
    composed = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    aliases = any(a.alias_info is not None for a in target._schema.arguments)
    unsafe = torch.Tag.maybe_aliasing_or_mutating in target.tags
    return has_form(target) and not target._schema.is_mutable and not unsafe and not (composed and aliases)


def _sizes(node: fx.Node) -> list[Any] | None:
    """What a reshaped tensor's sizes are in its graph: numbers, inputs, (input or what is reshaped, dimension), a count
    of one of these, or -1 for the only one that is computed otherwise; None for several of them.
    """
    inputs: dict[str, tuple[fx.Node | tuple[fx.Node, int], torch.SymInt]] = {}
    for given in (*node.graph.find_nodes(op="placeholder"), node.args[0]):
        assert isinstance(given, fx.Node)
        value = given.meta.get("val")
        if isinstance(value, torch.SymInt):
            inputs.setdefault(str(value), (given, value))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    inputs.setdefault(str(size), ((given, dim), size))
    sizes = [_size(s, inputs) if isinstance(s, torch.SymInt) else s for s in node.meta["val"].shape]
    # beside a -1 no other may be zero
    return None if -1 in sizes and sum(s in (-1, 0) or not isinstance(s, int) for s in sizes) > 1 else sizes


def _size(size: torch.SymInt, inputs: Mapping[str, tuple[Any, torch.SymInt]]) -> Any:
    if str(size) in inputs:
        return inputs[str(size)][0]
    factor, rest = size.node.expr.as_coeff_Mul()
    return _Times(*inputs[str(rest)], int(factor)) if str(rest) in inputs and factor.is_Integer else -1


def _write_view(node: fx.Node, sizes: list[Any], read: dict[Any, fx.Node]) -> None:
    """In place, as the program knows its outputs by name. `read`: the sizes that are nodes already."""
    graph, source = node.graph, node.args[0]
    assert isinstance(source, fx.Node)

    def written(size: Any, value: Any) -> fx.Node:
        if isinstance(size, fx.Node):
            return size
        if size not in read:
            if isinstance(size, _Times):
                once = written(size.once, size.value)
                with graph.inserting_after(once):
                    read[size] = graph.call_function(operator.mul, (once, size.factor))
            else:
                given = size[0].op == "placeholder"
                with graph.inserting_after(graph.find_nodes(op="placeholder")[-1] if given else size[0]):
                    read[size] = graph.call_function(aten.sym_size.int, size)
            read[size].meta = {"val": value}
        return read[size]

    for dim, size in enumerate(sizes):
        if isinstance(size, (tuple, _Times)):
            sizes[dim] = written(size, node.meta["val"].shape[dim])
    copied = _before(node, aten.clone.default, source, **_DENSE)
    node.target, node.args, node.kwargs = aten.view.default, (copied, sizes), {}


def _write_normalisation(node: fx.Node) -> None:
    """batch_norm in eval mode."""
    x, weight, bias, mean, variance, _, *numbers = node.args
    normalised = aten._native_batch_norm_legit_no_training.default
    found = _before(node, normalised, x, weight, bias, mean, variance, *numbers[:2])
    node.target, node.args, node.kwargs = operator.getitem, (found, 0), {}


def _write_differences(node: fx.Node) -> None:
    """diff of neighbours: x[1:] - x[:-1]."""
    dim = argument(node, 2, "dim", -1)
    ends = [argument(node, 3, "prepend"), node.args[0], argument(node, 4, "append")]
    joined = _before(node, aten.cat.default, [e for e in ends if e is not None], dim)
    later, earlier = (_before(node, aten.slice.Tensor, joined, dim, *ends) for ends in ((1, sys.maxsize), (0, -1)))
    node.target, node.args, node.kwargs = aten.sub.Tensor, (later, earlier), {}


def _write_mean(node: fx.Node) -> None:
    """adaptive_avg_pool2d to one place."""
    node.target, node.args, node.kwargs = aten.mean.dim, (node.args[0], [-1, -2], True), {}


def _chunks(node: fx.Node) -> list[Any]:
    dim = argument(node, 2, "dim", 0)
    return [piece.shape[dim] for piece in node.meta["val"]]


def _write_pieces(node: fx.Node) -> None:
    """chunk: of sizes that the trace tells."""
    pieces = (node.args[0], _chunks(node), argument(node, 2, "dim", 0))
    node.target, node.args, node.kwargs = aten.split_with_sizes.default, pieces, {}


def _cut(node: fx.Node) -> list[Any]:
    return [argument(node, k, name) for k, name in enumerate(("dim", "start", "length"), 1)]


def _write_slice(node: fx.Node) -> None:
    """narrow; a start below zero counts from the end."""
    dim, start, length = _cut(node)
    end = start + length
    end = sys.maxsize if start < 0 and end == 0 else end
    node.target, node.args, node.kwargs = aten.slice.Tensor, (node.args[0], dim, start, end), {}


def _expanded(node: fx.Node) -> list[int | None]:
    """The sizes for `expand`, -1 where the tensor has it already; None where it would have to be computed."""
    assert isinstance(node.args[0], fx.Node)
    have, want = node.args[0].meta["val"].shape, node.meta["val"].shape
    own = [None] * (len(want) - len(have)) + [str(size) for size in have]
    return [-1 if a == str(b) else b if isinstance(b, int) else None for a, b in zip(own, want, strict=True)]


def _write_expansion(node: fx.Node) -> None:
    node.target, node.args = aten.expand.default, (node.args[0], _expanded(node))


def _before(node: fx.Node, target: Any, *args: Any, **settings: Any) -> fx.Node:
    """A new node before `node`, with the value that the exporter reads its type from."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, settings)
    new.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
    new.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **settings)
    return new


# Where it can be, and how
_WRITTEN_OUT: dict[Any, tuple[Callable[[fx.Node], bool], Callable[[fx.Node], None]]] = {
    aten.adaptive_avg_pool2d.default: (lambda n: argument(n, 1, "output_size") == [1, 1], _write_mean),
    aten.batch_norm.default: (lambda n: not n.args[5], _write_normalisation),  # not in training
    aten.chunk.default: (lambda n: all(isinstance(size, int) for size in _chunks(n)), _write_pieces),
    aten.diff.default: (
        lambda n: argument(n, 1, "n", 1) == 1 and n.meta["val"].dtype != torch.bool, _write_differences,
    ),
    aten.expand_as.default: (lambda n: None not in _expanded(n), _write_expansion),
    aten.narrow.default: (lambda n: all(isinstance(number, int) for number in _cut(n)), _write_slice),
}  # fmt: skip
