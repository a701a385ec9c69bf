"""Heads that are cut apart and flattened again => Split of flat rows.

Cut between heads, the flat parts stand one after the other as they are. Cut within heads, they do where the columns of
the product that made them are written in that order: a permutation of its weight. A Split of a Split is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    Node,
    Value,
    dims,
    insert,
    ints,
    is_kind,
    is_private,
    lazily,
    number,
    other,
    producer,
    reader,
    replace,
    shaped,
    small,
    weight,
)
from thesean.deploy.lowering.lean.fold_weights import FOLDED, forget

if TYPE_CHECKING:
    import onnx_ir as ir


def split_rows(model: ir.Model) -> int:
    return _flat(model) + _nested(model)


def _flat(model: ir.Model) -> int:
    changed = 0
    for node in list(model.graph):
        shape, sizes = dims(node.inputs[0] if node.inputs else None), _sizes(node)
        if sizes is None or shape is None or len(shape) != 4 or not all(isinstance(d, int) for d in shape[2:]):
            continue
        axis = number(node, "axis", 0) % 4
        after: list[Node] = [reader(part, "Reshape") for part in node.outputs]
        rows = [s * shape[5 - axis] for s in sizes] if axis in (2, 3) else []
        if not rows or any(a is None for a in after):
            continue
        if any(dims(a.outputs[0]) != [*shape[:2], n] for a, n in zip(after, rows, strict=True)):
            continue
        whole = [*shape[:2], sum(rows)]
        flat = _flattened(node, whole) if axis == 2 else _reordered(model.graph, node, sizes)
        if flat is None:
            continue
        likes = [a.outputs[0] for a in after]
        parts = insert(node, "Split", [flat, ints(model.graph, *rows)], {"axis": 2}, like=likes)
        for old, part in zip(likes, parts, strict=True):
            replace(old, part)
        inner = producer(node.inputs[0], "Reshape") if axis == 3 else None
        model.graph.remove([*after, node, *([inner] if inner is not None else [])], safe=True)
        changed += 1
    return changed


def _sizes(node: Node) -> list[int] | None:
    if not is_kind(node, "Split") or len(node.inputs) < 2:
        return None
    found = small(node.inputs[1])
    return None if found is None else [int(i) for i in found]


def _flattened(node: Node, whole: list[Any]) -> Value:
    graph = node.graph
    (flat,) = insert(node, "Reshape", [node.inputs[0], ints(graph, 0, 0, -1)], like=[shaped(node.inputs[0], *whole)])
    return flat


def _reordered(graph: ir.Graph, node: Node, sizes: list[int]) -> Value | None:
    """What comes out of the product with its columns in the order of the parts; None where no product made it."""
    heads, width = dims(node.inputs[0])[2:]
    reshape = producer(node.inputs[0], "Reshape")
    add = None if reshape is None else producer(reshape.inputs[0], "Add")
    if add is None:
        return None
    bias = next((v for v in add.inputs if v.is_initializer() and dims(v) == [heads * width]), None)
    product = None if bias is None else producer(other(add, bias), "MatMul")
    matrix = None if product is None else product.inputs[1]
    if product is None or matrix is None or not matrix.is_initializer() or not is_private(matrix):
        return None
    if len(dims(matrix)) != 2 or len(dims(add.outputs[0])) != 3:
        return None
    column_HX = np.arange(heads * width).reshape(heads, width)
    order = np.concatenate([c.ravel() for c in np.split(column_HX, np.cumsum(sizes)[:-1], axis=1)])
    for read, at in ((product, 1), (add, list(add.inputs).index(bias))):
        value: Value = read.inputs[at]
        name = f"{str(value.name).removesuffix(FOLDED)}{FOLDED}"
        read.replace_input_with(at, weight(graph, name, lazily(_taken(value, order), value.dtype, dims(value))))
        forget(graph, [value])
    made: Value = add.outputs[0]
    return made


def _taken(value: Value, order: np.ndarray) -> Callable[[], np.ndarray]:
    tensor = value.const_value
    return lambda: tensor.numpy()[..., order]


def _nested(model: ir.Model) -> int:
    changed = 0
    for node in list(model.graph):
        sizes = _sizes(node)
        outer = producer(node.inputs[0], "Split") if sizes is not None else None
        wide = None if outer is None else _sizes(outer)
        if outer is None or wide is None or sizes is None:
            continue
        rank = len(dims(outer.inputs[0]) or ())
        if not rank or (number(node, "axis", 0) - number(outer, "axis", 0)) % rank:
            continue
        at = list(outer.outputs).index(node.inputs[0])
        olds = [*outer.outputs[:at], *node.outputs, *outer.outputs[at + 1 :]]
        all_sizes = ints(model.graph, *wide[:at], *sizes, *wide[at + 1 :])
        news = insert(outer, "Split", [outer.inputs[0], all_sizes], {"axis": number(outer, "axis", 0)}, like=olds)
        for old, new in zip(olds, news, strict=True):
            replace(old, new)
        model.graph.remove([node, outer], safe=True)
        changed += 1
    return changed
