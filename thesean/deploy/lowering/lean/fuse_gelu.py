"""gelu(x + b), written out with tanh or by itself, => FastGelu(x, b) or BiasGelu(x, b); and x sigmoid(x) => QuickGelu.

Operators of onnxruntime: it would find most of these itself, but not with the bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
)

if TYPE_CHECKING:
    import onnx_ir as ir

_ROOT, _CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the cubic term of Hendrycks & Gimpel 2016


def fuse_gelu(model: ir.Model) -> int:
    import onnx_ir as ir

    changed = 0
    for node in list(model.graph):
        made = node.outputs[0]
        if made.dtype != ir.DataType.FLOAT:  # onnxruntime has these for no other on a CPU
            continue
        found = _gelu(node) or _tanh_gelu(node) or _silu(node)
        if found is None:
            continue
        x, kind, inner = found
        attributes = {"alpha": 1.0} if kind == "QuickGelu" else {}
        inputs, add = [x], x.producer()
        if add is None or kind == "QuickGelu" or not is_kind(add, "Add") or x.is_graph_output():
            add = None
        elif any(n is not node and n not in inner for n in x.consumers()):  # the sum is needed elsewhere too
            add = None
        for bias in add.inputs if add is not None else ():
            plain = other(add, bias)
            if bias.is_initializer() and dims(bias) == (dims(x) or [])[-1:] and plain is not None:
                inputs, inner = [plain, bias], [*inner, add]
                break
        if kind == "BiasGelu" and len(inputs) == 1:
            continue
        (new,) = insert(node, kind, inputs, attributes, like=[made], domain=MICROSOFT)
        replace(made, new)
        model.graph.remove([node, *inner], safe=True)
        changed += 1
    return changed


Found = tuple[Value, str, list[Node]]  # what goes in, the operator, and the nodes before the last


def _gelu(node: Node) -> Found | None:
    if not is_kind(node, "Gelu") or node.inputs[0] is None:
        return None
    return node.inputs[0], "FastGelu" if number(node, "approximate", "none") == "tanh" else "BiasGelu", []


def _silu(node: Node) -> Found | None:
    if not is_kind(node, "Mul"):
        return None
    for gate in node.inputs:
        sigmoid, x = producer(gate, "Sigmoid"), other(node, gate)
        if sigmoid is not None and x is not None and sigmoid.inputs[0] is x:
            return x, "QuickGelu", [sigmoid]
    return None


def _tanh_gelu(node: Node) -> Found | None:
    """0.5 x (1 + tanh(root (x + cube x^3))), as torch writes it."""
    if not is_kind(node, "Mul"):
        return None
    for side in node.inputs:
        half, one = producer(side, "Mul"), producer(other(node, side), "Add")
        if half is None or one is None:
            continue
        x = next((other(half, v) for v in half.inputs if is_scalar(v, 0.5)), None)
        tanh = next((producer(v, "Tanh") for v in one.inputs if is_scalar(other(one, v), 1.0)), None)
        scaled = None if tanh is None else producer(tanh.inputs[0], "Mul")
        if x is None or tanh is None or scaled is None:
            continue
        inner = next((producer(v, "Add") for v in scaled.inputs if is_scalar(other(scaled, v), _ROOT)), None)
        if inner is None or x not in inner.inputs:
            continue
        cubed = producer(other(inner, x), "Mul")
        if cubed is None:
            continue
        power = next((producer(v, "Pow") for v in cubed.inputs if is_scalar(other(cubed, v), _CUBE)), None)
        if power is not None and power.inputs[0] is x and is_scalar(power.inputs[1], 3.0):
            return x, "FastGelu", [half, one, tanh, scaled, inner, cubed, power]
    return None
