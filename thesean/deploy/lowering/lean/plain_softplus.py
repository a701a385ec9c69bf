"""Where(x > 20, x, Softplus(x)) => Softplus(x), which onnxruntime computes without overflow: both are x there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thesean.deploy.lowering.lean.edit import is_kind, producer, replace, small

if TYPE_CHECKING:
    import onnx_ir as ir

# beyond it softplus(x) - x is below float32's digits
_LEAST = 17.0


def plain_softplus(model: ir.Model) -> int:
    changed = 0
    for node in list(model.graph):
        if not is_kind(node, "Where"):
            continue
        over, soft = producer(node.inputs[0], "Greater"), producer(node.inputs[2], "Softplus")
        x = node.inputs[1]
        if over is None or soft is None or soft.inputs[0] is not x or over.inputs[0] is not x:
            continue
        threshold = small(over.inputs[1])
        if threshold is None or threshold.size != 1 or threshold.reshape(()) < _LEAST:
            continue
        replace(node.outputs[0], soft.outputs[0])
        model.graph.remove([node, over], safe=True)
        changed += 1
    return changed
