"""w (x / sqrt(mean(x^2) + eps)) => SimplifiedLayerNormalization(x, w): one node for seven, and for six without a w.

So is x / sqrt(sum(x^2) + eps), of K columns: w is 1 / sqrt(K), and the mean's eps a K-th.

An operator of onnxruntime, in the name space of ONNX itself; it finds the form that is written with a quotient, and not
the one with a reciprocal, as torch's exporter writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    Node,
    Value,
    constant,
    dims,
    insert,
    is_kind,
    is_scalar,
    number,
    other,
    producer,
    replace,
    small,
)

if TYPE_CHECKING:
    import onnx_ir as ir


def fuse_rms_norm(model: ir.Model) -> int:
    import onnx_ir as ir

    changed = 0
    for alone in (False, True):  # first those with a weight, of which the others are a part
        for node in list(model.graph):
            if is_kind(node, "Mul") and node.outputs[0].dtype == ir.DataType.FLOAT:
                changed += _alone(node) if alone else _weighted(node)
    return changed


def _weighted(node: Node) -> bool:
    for weight in node.inputs:
        inner = producer(other(node, weight), "Mul")
        found = None if inner is None or weight is None or not weight.is_initializer() else _normed(inner)
        if inner is None or found is None or dims(weight) != (dims(found.x) or [])[-1:]:
            continue
        if found.scale == 1:
            _fuse(node, found, weight, [inner])
            return True
    return False


def _alone(node: Node) -> bool:
    found = _normed(node)
    if found is None:
        return False
    columns = dims(found.x)[-1]
    weight = constant(node.graph, f"norm_{columns}_{found.scale:.6g}", np.full(columns, found.scale, np.float32))
    _fuse(node, found, weight, [])
    return True


class Norm(NamedTuple):
    """x scale / sqrt(mean(x^2) + eps), and the nodes before the product."""

    x: Value
    eps: float
    scale: float
    before: list[Node]


def _fuse(node: Node, found: Norm, weight: Value, between: list[Node]) -> None:
    attributes = {"axis": -1, "epsilon": found.eps, "stash_type": 1}
    (new,) = insert(node, "SimplifiedLayerNormalization", [found.x, weight], attributes, like=[node.outputs[0]])
    replace(node.outputs[0], new)
    node.graph.remove([node, *between, *found.before], safe=True)


def _normed(node: Node) -> Norm | None:
    for side in node.inputs:
        x, inverse = other(node, side), producer(side, "Reciprocal")
        root = None if inverse is None else producer(inverse.inputs[0], "Sqrt")
        total = None if root is None else producer(root.inputs[0], "Add")
        if inverse is None or root is None or total is None:
            continue
        for value in total.inputs:
            mean, eps = producer(value, "ReduceMean", "ReduceSum"), small(other(total, value))
            square = None if mean is None else producer(mean.inputs[0], "Pow", "Mul")
            if mean is None or square is None or eps is None or eps.size != 1 or not _squares(square, x):
                continue
            axes = small(mean.inputs[1]) if len(mean.inputs) > 1 else None
            shape = dims(x) or [""]
            if axes is None or axes.tolist() not in ([-1], [len(shape) - 1]) or number(mean, "keepdims", 1) != 1:
                continue
            columns = 1 if is_kind(mean, "ReduceMean") else shape[-1]
            if isinstance(columns, int) and isinstance(shape[-1], int):
                before = [inverse, root, total, mean, square]
                return Norm(x, float(eps.reshape(())) / columns, columns**-0.5, before)
    return None


def _squares(node: Node, x: Value) -> bool:
    if is_kind(node, "Pow"):
        return node.inputs[0] is x and is_scalar(node.inputs[1], 2.0)
    return all(value is x for value in node.inputs)
