"""Reshape -> Gemm -> Reshape => MatMul -> Add: a product of rows takes any number of dimensions in front."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from thesean.deploy.lowering.lean.edit import dims, insert, ints, is_kind, number, producer, reader, replace, shaped

if TYPE_CHECKING:
    import onnx_ir as ir


def products_of_rows(model: ir.Model) -> int:
    changed = 0
    for node in list(model.graph):
        if not is_kind(node, "Gemm") or number(node, "transA", 0):
            continue
        if number(node, "alpha", 1.0) != 1.0 or number(node, "beta", 1.0) != 1.0:
            continue
        before, after = producer(node.inputs[0], "Reshape"), reader(node.outputs[0], "Reshape")
        if before is None or after is None:
            continue
        x, weight, made = before.inputs[0], node.inputs[1], after.outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        rows, flat, given = dims(x), dims(node.inputs[0]), dims(made)
        if x is None or weight is None or not rows or not given or not flat:
            continue
        width = dims(weight)
        front = given[:-1]
        if rows[: len(front)] != front or width is None or len(width) != 2 or not isinstance(flat[-1], int):
            continue
        if any(not isinstance(size, int) for size in rows[len(front) :]) or prod(rows[len(front) :]) != flat[-1]:
            continue
        if bias is not None and dims(bias) != [given[-1]]:
            continue
        if number(node, "transB", 0):
            (weight,) = insert(node, "Transpose", [weight], {"perm": [1, 0]}, like=[shaped(weight, *reversed(width))])
        if len(rows) != len(given):
            (x,) = insert(
                node, "Reshape", [x, ints(model.graph, *(0 for _ in front), -1)], like=[shaped(x, *front, flat[-1])]
            )
        (product,) = insert(node, "MatMul", [x, weight], like=[made])
        if bias is not None:
            (product,) = insert(node, "Add", [product, bias], like=[made])
        replace(made, product)
        model.graph.remove([after, node, before], safe=True)
        changed += 1
    return changed
