"""norm(a + x + b) => SkipLayerNormalization(a, x, b), b a product's bias: the residual sum, its bias and its norm.

The RMS form, x rsqrt(mean(x^2) + eps) w, becomes SkipSimplifiedLayerNormalization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from thesean.deploy.lowering.lean.edit import (
    MICROSOFT,
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


class Norm(NamedTuple):
    x: Value
    weights: list[Value]
    eps: float
    inner: list[Node]  # the nodes before the last
    readers: int  # of x, among these


def fuse_norms(model: ir.Model) -> int:
    import onnx_ir as ir

    changed = 0
    for node in list(model.graph):
        norm = _layer_norm(node) or _rms_norm(node)
        if norm is None or node.outputs[0].dtype != ir.DataType.FLOAT:
            continue
        total = norm.x.producer()
        if total is None or not is_kind(total, "Add") or norm.x.is_graph_output():
            continue
        shape, given = dims(norm.x), list(total.inputs)
        if shape is None or len(shape) != 3 or any(dims(v) != shape or v.is_initializer() for v in given):
            continue
        if not all(w.is_initializer() and dims(w) == shape[-1:] for w in norm.weights):
            continue
        (first, skip), bias, adds = given, None, [total]
        for value in given:  # the bias of a product that nothing else reads
            add = producer(value, "Add")
            bias = next((v for v in add.inputs if v.is_initializer() and dims(v) == shape[-1:]), None) if add else None
            if add is not None and bias is not None:
                first, skip = other(add, bias), other(total, value)
                adds.append(add)
                break
        if dims(first) != shape:
            continue
        simplified = len(norm.weights) == 1 and norm.inner != []
        kind = "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization"
        inputs = [first, skip, *norm.weights]
        if bias is not None:
            inputs += [*([None] if not simplified and len(norm.weights) == 1 else []), bias]
        alone = len(norm.x.uses()) == norm.readers
        # right behind the sum: what else reads it may come before the norm
        made = insert(
            total,
            kind,
            inputs,
            {"epsilon": norm.eps},
            like=[node.outputs[0], *([] if alone else [None, None, norm.x])],
            domain=MICROSOFT,
            of=node,
        )
        replace(node.outputs[0], made[0])
        if not alone:
            norm.x.replace_all_uses_with(made[3])
        model.graph.remove([node, *norm.inner, *adds], safe=True)
        changed += 1
    return changed


def _layer_norm(node: Node) -> Norm | None:
    if not is_kind(node, "LayerNormalization") or number(node, "axis", -1) not in (-1, 2) or len(node.outputs) > 1:
        return None
    weights = [v for v in node.inputs[1:] if v is not None]
    if not weights or node.inputs[0] is None:
        return None
    return Norm(node.inputs[0], weights, number(node, "epsilon", 1e-5), [], 1)


def _rms_norm(node: Node) -> Norm | None:
    """w (x / sqrt(mean(x x) + eps)), as torch writes it."""
    if not is_kind(node, "Mul"):
        return None
    for weight in node.inputs:
        scaled = producer(other(node, weight), "Mul") if weight is not None and weight.is_initializer() else None
        if scaled is None:
            continue
        for factor in scaled.inputs:
            x, chain = other(scaled, factor), []
            value: Value | None = factor
            for kind in ("Reciprocal", "Sqrt", "Add", "ReduceMean", "Pow"):
                link = producer(value, kind)
                if link is None:
                    break
                chain.append(link)
                value = link.inputs[0]
            if len(chain) < 5 or value is not x or x is None:
                continue
            eps, axes = small(chain[2].inputs[1]), small(chain[3].inputs[1])
            last = axes is not None and axes.tolist() in ([-1], [len(dims(x) or ()) - 1])
            if eps is not None and eps.size == 1 and last and is_scalar(chain[4].inputs[1], 2.0):
                return Norm(x, [weight], float(eps.reshape(())), [scaled, *chain], 2)
    return None
