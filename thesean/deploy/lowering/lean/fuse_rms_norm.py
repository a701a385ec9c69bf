"""w (x / sqrt(mean(x^2) + eps)) => SimplifiedLayerNormalization(x, w): one node for seven.

An operator of onnxruntime, in the name space of ONNX itself; it finds the form that is written with a quotient, and not
the one with a reciprocal, as torch's exporter writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thesean.deploy.lowering.lean.edit import (
    Node,
    Value,
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
    for node in list(model.graph):
        if not is_kind(node, "Mul") or node.outputs[0].dtype != ir.DataType.FLOAT:
            continue
        for weight in node.inputs:
            inner = producer(other(node, weight), "Mul")
            found = None if inner is None or weight is None or not weight.is_initializer() else _normed(inner)
            if inner is None or found is None or dims(weight) != (dims(found[0]) or [])[-1:]:
                continue
            x, eps, before = found
            attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
            (new,) = insert(node, "SimplifiedLayerNormalization", [x, weight], attributes, like=[node.outputs[0]])
            replace(node.outputs[0], new)
            model.graph.remove([node, inner, *before], safe=True)
            changed += 1
            break
    return changed


def _normed(node: Node) -> tuple[Value, float, list[Node]] | None:
    """x and eps of x (1 / sqrt(mean(x^2) + eps)), and the nodes before the product."""
    for side in node.inputs:
        x, inverse = other(node, side), producer(side, "Reciprocal")
        root = None if inverse is None else producer(inverse.inputs[0], "Sqrt")
        total = None if root is None else producer(root.inputs[0], "Add")
        if inverse is None or root is None or total is None:
            continue
        for value in total.inputs:
            mean, eps = producer(value, "ReduceMean"), small(other(total, value))
            square = None if mean is None else producer(mean.inputs[0], "Pow", "Mul")
            if mean is None or square is None or eps is None or eps.size != 1 or not _squares(square, x):
                continue
            axes = small(mean.inputs[1]) if len(mean.inputs) > 1 else None
            rank = len(dims(x) or [])
            if axes is not None and axes.tolist() in ([-1], [rank - 1]) and number(mean, "keepdims", 1) == 1:
                return x, float(eps.reshape(())), [inverse, root, total, mean, square]
    return None


def _squares(node: Node, x: Value) -> bool:
    if is_kind(node, "Pow"):
        return node.inputs[0] is x and is_scalar(node.inputs[1], 2.0)
    return all(value is x for value in node.inputs)
