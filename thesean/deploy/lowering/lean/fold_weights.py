"""What is computed from weights alone => a weight, made when the file is written.

onnxruntime would do it whenever the file is loaded, and would hold both meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from thesean.deploy.lowering.lean.edit import Node, Value, lazily, number, replace, small, weight

if TYPE_CHECKING:
    import onnx_ir as ir

_MADE: dict[str, Callable[..., np.ndarray]] = {
    "Add": lambda node, a, b: a + b,
    "Concat": lambda node, *parts: np.concatenate(parts, number(node, "axis", 0)),
    "MatMul": lambda node, a, b: a @ b,
    "Mul": lambda node, a, b: a * b,
    "Neg": lambda node, a: -a,
    "Pad": lambda node, a, pads, value=0: np.pad(a, pads.reshape(2, -1).T, constant_values=value),
    "Reshape": lambda node, a, shape: a.reshape([a.shape[i] if not s else int(s) for i, s in enumerate(shape)]),
    "Squeeze": lambda node, a, axes: a.squeeze(tuple(int(i) for i in axes)),
    "Transpose": lambda node, a: a.transpose(number(node, "perm", None)),
    "Unsqueeze": lambda node, a, axes: np.expand_dims(a, tuple(int(i) for i in axes)),
}

FOLDED = ".folded"

_SMALL = 1024  # elements; of a larger weight no second copy is made where other nodes need the first


def fold_weights(model: ir.Model) -> int:
    changed = 0
    node: Node
    for node in list(model.graph):
        if node.domain or node.op_type not in _MADE or not _known(node):
            continue
        given, made = list(node.inputs), node.outputs[0]
        tensors: list[Any] = [None if v is None or not v.is_initializer() else v.const_value for v in given]
        if any(t is None for t in tensors) or made.is_graph_output():
            continue
        if made.dtype is None or made.shape is None or not made.shape.is_static():
            continue
        shape = [int(d) for d in made.shape]
        if any(len(v.uses()) > 1 and v.const_value.size > _SMALL for v in given):
            continue
        if math.prod(shape) > 2 * sum(t.size for t in tensors) + _SMALL:
            continue
        largest = max(given, key=lambda v: v.const_value.size)
        tensor = lazily(_maker(node, tensors), made.dtype, shape)
        replace(made, weight(model.graph, f"{str(largest.name).removesuffix(FOLDED)}{FOLDED}", tensor))
        model.graph.remove(node, safe=True)
        forget(model.graph, given)
        changed += 1
    return changed


def forget(graph: ir.Graph, values: list[Value]) -> None:
    """Drop weights that nothing reads any more."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name, None)


def _known(node: Node) -> bool:
    """Whether the functions above say what it is."""
    if node.op_type == "Pad":
        return len(node.inputs) <= 3 and number(node, "mode", "constant") == "constant"
    return node.op_type != "Reshape" or small(node.inputs[1]) is not None


def _maker(node: Node, tensors: list[Any]) -> Callable[[], np.ndarray]:
    return lambda: _MADE[node.op_type](node, *(t.numpy() for t in tensors))
