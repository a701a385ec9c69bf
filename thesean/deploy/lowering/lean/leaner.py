"""All passes that leave fewer nodes, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from thesean.deploy.lowering.lean.divide_rows import divide_rows
from thesean.deploy.lowering.lean.fold_batch_norm import fold_batch_norm
from thesean.deploy.lowering.lean.fold_weights import fold_weights
from thesean.deploy.lowering.lean.fuse_gelu import fuse_gelu
from thesean.deploy.lowering.lean.fuse_rms_norm import fuse_rms_norm
from thesean.deploy.lowering.lean.fuse_rotation import fuse_rotation
from thesean.deploy.lowering.lean.join_products import join_products
from thesean.deploy.lowering.lean.merge_products import merge_products
from thesean.deploy.lowering.lean.plain_softplus import plain_softplus
from thesean.deploy.lowering.lean.products_of_rows import products_of_rows
from thesean.deploy.lowering.lean.reshape_by_constant import reshape_by_constant
from thesean.deploy.lowering.lean.share_counters import share_counters
from thesean.deploy.lowering.lean.split_later import split_later
from thesean.deploy.lowering.lean.split_rows import split_rows
from thesean.deploy.lowering.lean.split_slices import split_slices
from thesean.deploy.lowering.lean.sum_residuals import sum_residuals

if TYPE_CHECKING:
    import onnx_ir as ir

PASSES: tuple[Callable[[ir.Model], int], ...] = (
    share_counters,
    reshape_by_constant,
    plain_softplus,
    split_slices,
    products_of_rows,
    fold_weights,
    fold_batch_norm,
    merge_products,
    split_rows,
    join_products,
    split_rows,
    split_later,
    divide_rows,
    fuse_gelu,
    fuse_rms_norm,
    fuse_rotation,
    sum_residuals,
)


# Those that write operators of onnxruntime's own.
FOREIGN = (fuse_gelu, fuse_rms_norm, fuse_rotation)


def leaner(model: ir.Model, portable: bool = False) -> None:
    """Apply them, and drop what nothing reads. What the graph computes stays the same to rounding. `portable`: no
    operator comes in that ONNX itself doesn't have.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    before = {value.name for value in model.graph.inputs}
    for leave in PASSES:
        if not (portable and leave in FOREIGN):
            leave(model)
    RemoveUnusedNodesPass()(model)
    assert before == {value.name for value in model.graph.inputs}
    if any(node.domain == "com.microsoft" for node in model.graph.all_nodes()):
        model.graph.opset_imports.setdefault("com.microsoft", 1)
