"""Which products of a file may be quantised: of activations with a matrix of weights, in the graph itself.

What stands in functions and in the branches of an `If` multiplies no weights: heads meet there, and states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thesean.deploy.lowering.lean.edit import Node, dims, insert, is_kind, number, replace, weight
from thesean.deploy.lowering.lean.fold_weights import forget
from thesean.deploy.onnx_file import weights_bytes
from thesean.deploy.quantizing.tables import looked_up

if TYPE_CHECKING:
    import onnx_ir as ir


_TURNED = ".transposed"  # ends the name of weights that lie the other way


@dataclass(frozen=True, kw_only=True)
class Products:
    """The names of nodes, and the share of the file's weights, in bytes, that they multiply and that `embeddings` are,
    tables whose rows are looked up. `tables`: those by weights that lie in the file once more, as such a table, and its
    name: an embedding that is the head too.
    """

    names: tuple[str, ...]
    share: float
    tables: Mapping[str, str] = field(default_factory=dict)
    embeddings: int = 0


def products(model: ir.Model, kinds: tuple[str, ...]) -> Products:
    """Those with weights, among nodes of these kinds."""
    import onnx_ir as ir

    found: list[str] = []
    tables: dict[str, str] = {}
    counted: dict[int, int] = {}
    for node in model.graph:
        if node.domain or node.op_type not in kinds or len(node.inputs) < 2:
            continue
        value: Any = node.inputs[1]
        if not _is_weights(value):
            continue
        if value.const_value.dtype != ir.DataType.FLOAT or not value.const_value.size:
            continue
        if node.op_type == "MatMul" and len(value.const_value.shape) != 2:
            continue
        found.append(str(node.name))
        counted[id(value)] = value.const_value.nbytes
        table = model.graph.initializers.get(str(value.name).removesuffix(_TURNED))
        if table is not None and any(is_kind(user, "Gather") and at == 0 for user, at in table.uses()):
            tables[str(node.name)] = str(table.name)
    embeddings = list(looked_up(model))
    counted |= {id(table): table.const_value.nbytes for table in embeddings if table.const_value is not None}
    share = sum(counted.values()) / max(1, weights_bytes(model))
    return Products(names=tuple(found), share=share, tables=tables, embeddings=len(embeddings))


def split_gemms(model: ir.Model) -> int:
    """Gemm => MatMul -> Add, its weights the way a MatMul reads them: the tools know more of these. A matrix that
    another node reads as it lies stays for that one, so an embedding that is the head too is written twice.
    """
    changed = 0
    node: Node
    for node in list(model.graph):
        matrix = _matrix(node) if is_kind(node, "Gemm") else None
        if matrix is None:
            continue
        made, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        given = matrix
        if number(node, "transB", 0):
            matrix = _transposed(model.graph, matrix)
        (product,) = insert(node, "MatMul", [node.inputs[0], matrix], like=[made])
        product.producer().name = node.name
        if bias is not None:
            (product,) = insert(node, "Add", [product, bias], like=[made])
            product.producer().name = f"{node.name}_bias"
        replace(made, product)
        model.graph.remove(node, safe=True)
        forget(model.graph, [given])
        changed += 1
    return changed


def turn_weights(model: ir.Model) -> int:
    """MatMul by the Transpose of weights => by weights that lie so: the tools look for nothing behind it. An embedding
    that is the head too is written twice.
    """
    changed = 0
    for node in list(model.graph):
        turned: Any = node.inputs[1] if is_kind(node, "MatMul") else None
        turn = None if turned is None else turned.producer()
        if turn is None or not is_kind(turn, "Transpose"):
            continue
        value = turn.inputs[0]
        if not _is_weights(value) or list(number(turn, "perm", [1, 0])) != [1, 0]:
            continue
        node.replace_input_with(1, _transposed(model.graph, value))
        if not turned.uses() and not turned.is_graph_output():
            model.graph.remove(turn, safe=True)
            forget(model.graph, [value])
        changed += 1
    return changed


def _is_weights(value: Any) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def _matrix(node: Node) -> Any:
    """The weights of a Gemm that does no more than multiply and add."""
    value = node.inputs[1]
    if not _is_weights(value) or dims(value) is None:
        return None
    if number(node, "transA", 0) or number(node, "alpha", 1.0) != 1.0 or number(node, "beta", 1.0) != 1.0:
        return None
    return value


def _transposed(graph: ir.Graph, value: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    array = np.ascontiguousarray(value.const_value.numpy().T)
    return weight(graph, f"{value.name}{_TURNED}", ir.Tensor(array))
