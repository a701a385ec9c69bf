"""A product by whole numbers of 4 bits in place of one by floats: onnxruntime's MatMulNBits.

K features in, N out, G blocks of B features that have one scale
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from thesean.deploy.lowering.lean.edit import MICROSOFT, Node, insert, replace, weight
from thesean.deploy.lowering.lean.fold_weights import forget

if TYPE_CHECKING:
    from thesean.deploy.quantizing.rounding import Rounded

_BITS = 4


def put_in_place(node: Node, rounded: Rounded, block: int, accuracy: int) -> None:
    """Of a MatMul by weights, which go where nothing else reads them. `accuracy`: the operator's accuracy_level."""
    import onnx_ir as ir

    x, matrix = node.inputs
    features, outputs = matrix.shape
    arrays = {
        "levels": _two_in_a_byte(rounded.level_KN.T.unflatten(1, (-1, block))),
        "scales": rounded.scale_GN.T,
        "zeros": _two_in_a_byte(rounded.zero_GN.T),
    }
    tensors = {name: ir.Tensor(array.contiguous().numpy()) for name, array in arrays.items()}
    made = [weight(node.graph, f"{matrix.name}.{name}", tensor) for name, tensor in tensors.items()]
    told: dict[str, Any] = {"K": int(features), "N": int(outputs), "bits": _BITS, "block_size": block}
    told["accuracy_level"] = accuracy
    (product,) = insert(node, "MatMulNBits", [x, *made], told, like=[node.outputs[0]], domain=MICROSOFT)
    product.producer().name = f"{node.name}_Q{_BITS}"
    replace(node.outputs[0], product)
    node.graph.remove(node, safe=True)
    forget(product.producer().graph, [matrix])


def _two_in_a_byte(levels: torch.Tensor) -> torch.Tensor:
    """Of the last axis, the first in the lower half; an odd one is alone."""
    even = torch.nn.functional.pad(levels, (0, levels.shape[-1] % 2))
    return even[..., 0::2] | even[..., 1::2] << _BITS
