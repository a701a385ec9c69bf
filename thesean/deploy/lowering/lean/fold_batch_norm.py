"""A norm by the batch behind one by the layer => the layer norm's scale and bias.

In a file its statistics are constants, so that it is a scale and a shift of each feature. Behind a product or a
convolution the exporter's own optimizer has put it into the weights.

E features
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    Node,
    along_last,
    dims,
    is_kind,
    is_private,
    lazily,
    number,
    producer,
    replace,
    weight,
)
from thesean.deploy.lowering.lean.fold_weights import FOLDED, forget

if TYPE_CHECKING:
    import onnx_ir as ir

_EPSILON = 1e-5  # where the operator names none


def fold_batch_norm(model: ir.Model) -> int:
    return sum(_fold(model.graph, node) for node in list(model.graph) if is_kind(node, "BatchNormalization"))


def _fold(graph: ir.Graph, node: Node) -> int:
    layer = producer(node.inputs[0], "LayerNormalization")
    if layer is None or len(dims(layer.inputs[0]) or ()) != 2 or not along_last(layer, layer.inputs[0]):
        return 0
    own, theirs = list(node.inputs[1:]), list(layer.inputs[1:])
    if not all(v is not None and v.is_initializer() and is_private(v) for v in (*own, *theirs)):
        return 0
    if number(node, "training_mode", 0) or any(output.uses() for output in node.outputs[1:]):
        return 0
    epsilon, dtype, shape = number(node, "epsilon", _EPSILON), theirs[0].dtype, dims(theirs[0])
    tensors = [v.const_value for v in own]
    kept = [v.const_value for v in theirs]
    names = [f"{str(theirs[0].name).removesuffix(FOLDED)}{end}{FOLDED}" for end in ("", ".bias")]
    scale = lazily(lambda: _folded(tensors, kept, epsilon)[0], dtype, shape)
    bias = lazily(lambda: _folded(tensors, kept, epsilon)[1], dtype, shape)
    layer.resize_inputs(3)
    for place, (name, tensor) in enumerate(zip(names, (scale, bias), strict=True), 1):
        layer.replace_input_with(place, weight(graph, name, tensor))
    replace(node.outputs[0], layer.outputs[0])
    graph.remove(node, safe=True)
    forget(graph, [*own, *theirs])
    return 1


def _folded(norm: list[Any], layer: list[Any], epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias (E,), computed in double."""
    gain_E, shift_E, mean_E, variance_E = (t.numpy().astype(np.float64) for t in norm)
    scale_E = layer[0].numpy().astype(np.float64)
    bias_E = layer[1].numpy().astype(np.float64) if len(layer) > 1 else np.zeros_like(scale_E)
    factor_E = gain_E / np.sqrt(variance_E + epsilon)
    dtype = layer[0].numpy().dtype
    return (scale_E * factor_E).astype(dtype), ((bias_E - mean_E) * factor_E + shift_E).astype(dtype)
