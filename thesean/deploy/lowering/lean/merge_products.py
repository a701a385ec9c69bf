"""(x A + a) C + c  =>  x (A C) + (a C + c), and the same where a recurrent cell's gates read it.

Where what lies between is read there alone, and one product takes no more numbers than two.

K, N, M numbers before, between and behind; D directions, G gates of all units
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    Node,
    Value,
    dims,
    insert,
    is_kind,
    is_private,
    lazily,
    number,
    other,
    producer,
    reader,
    replace,
    weight,
)
from thesean.deploy.lowering.lean.fold_weights import FOLDED, forget
from thesean.deploy.lowering.lean.join_products import Product, product_of

if TYPE_CHECKING:
    import onnx_ir as ir

_CELLS = ("LSTM", "GRU", "RNN")


def merge_products(model: ir.Model) -> int:
    changed = 0
    for node in list(model.graph):
        if is_kind(node, "MatMul"):
            changed += _into_product(model.graph, node)
        elif is_kind(node, *_CELLS):
            changed += _into_cell(model.graph, node)
    return changed


def _product(value: Value | None) -> Product | None:
    """What makes a value that one node alone reads."""
    node = producer(value, "Add", "MatMul")
    if node is not None and node.op_type == "Add":
        node = producer(node.inputs[0], "MatMul") or producer(node.inputs[1], "MatMul")
    found = None if node is None else product_of(node)
    return found if found is not None and found.made is value and is_private(found.weight) else None


def _into_product(graph: ir.Graph, node: Node) -> int:
    first = _product(node.inputs[0])
    second = node.inputs[1]
    known = second is not None and second.is_initializer() and is_private(second) and len(dims(second) or ()) == 2
    if first is None or not known:
        return 0
    (before, between), behind = dims(first.weight), dims(second)[1]
    if before * behind > between * (before + behind):
        return 0
    kept, then = first.weight.const_value, second.const_value
    name = f"{str(first.weight.name).removesuffix(FOLDED)}*{str(second.name).removesuffix(FOLDED)}"
    merged = weight(graph, name, lazily(lambda: _times(kept.numpy(), then.numpy()), second.dtype, [before, behind]))
    made = node.outputs[0]
    (new,) = insert(node, "MatMul", [first.node.inputs[0], merged], like=[made])
    given = [second]
    if first.bias is not None:
        added = first.bias.const_value
        after = reader(made, "Add")
        own = None if after is None else other(after, made)
        told = own is not None and own.is_initializer() and is_private(own) and dims(own) == [behind]
        had = own.const_value if told and own is not None else None
        bias = weight(graph, f"{name}.bias", lazily(lambda: _added(added, then, had), second.dtype, [behind]))
        if told and after is not None:
            after.replace_input_with(0 if after.inputs[0] is own else 1, bias)
            given.append(own)
        else:
            (new,) = insert(node, "Add", [new, bias], like=[made])
    replace(made, new)
    graph.remove(node, safe=True)
    _drop(graph, first, given)
    return 1


def _into_cell(graph: ir.Graph, cell: Node) -> int:
    turned = producer(cell.inputs[0], "Transpose")
    order = None if turned is None else number(turned, "perm", None)
    if turned is not None and (not order or order[-1] != len(order) - 1):
        return 0
    first = _product(cell.inputs[0] if turned is None else turned.inputs[0])
    matrix, bias = cell.inputs[1], cell.inputs[3] if len(cell.inputs) > 3 else None
    known = matrix is not None and matrix.is_initializer() and is_private(matrix)
    if first is None or not known or (bias is not None and not (bias.is_initializer() and is_private(bias))):
        return 0
    (before, between), (directions, gates, _) = dims(first.weight), dims(matrix)
    if directions * gates * before > between * (before + directions * gates):
        return 0
    kept, then = first.weight.const_value, matrix.const_value
    own = lazily(lambda: _times(then.numpy(), kept.numpy().T), matrix.dtype, [directions, gates, before])
    cell.replace_input_with(1, weight(graph, f"{str(matrix.name).removesuffix(FOLDED)}{FOLDED}", own))
    given = [matrix]
    if first.bias is not None:
        added, had = first.bias.const_value, None if bias is None else bias.const_value
        told = lazily(lambda: _biases(then, added, had), matrix.dtype, [directions, 2 * gates])
        made = weight(graph, f"{str(matrix.name).removesuffix(FOLDED)}.bias{FOLDED}", told)
        if bias is None:
            cell.resize_inputs(max(4, len(cell.inputs)))
        else:
            given.append(bias)
        cell.replace_input_with(3, made)
    read = first.node.inputs[0]
    back = producer(read, "Transpose") if turned is not None else None
    back = back if back is not None and _undoes(number(back, "perm", None), order) else None
    if turned is not None and back is not None:
        cell.replace_input_with(0, back.inputs[0])
        graph.remove(turned, safe=True)
    elif turned is not None:
        turned.replace_input_with(0, read)
        turned.outputs[0].shape = None  # as wide as what is read now
    else:
        cell.replace_input_with(0, read)
    _drop(graph, first, given)
    if back is not None:
        graph.remove(back, safe=True)
    return 1


def _undoes(first: Any, second: Any) -> bool:
    """Whether two orders of dimensions, one after the other, leave them as they were."""
    return first is not None and [first[d] for d in second] == sorted(first)


def _added(bias: Any, matrix: Any, had: Any) -> np.ndarray:
    """(M,): what the bias between comes to, and that behind where there was one."""
    return _times(bias.numpy(), matrix.numpy()) + (0 if had is None else had.numpy())


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In double: the sums of half precision's numbers would be coarse."""
    return np.asarray(a.astype(np.float64) @ b.astype(np.float64)).astype(a.dtype)


def _biases(matrix: Any, added: Any, had: Any) -> np.ndarray:
    """(D, 2 G): those of the inputs, and those of the hidden state."""
    more_DG = _times(matrix.numpy(), added.numpy())
    none_DG = np.zeros_like(more_DG)
    return np.concatenate([more_DG, none_DG], 1) + (0 if had is None else had.numpy())


def _drop(graph: ir.Graph, first: Product, given: list[Value]) -> None:
    """The first product, and weights that nothing reads any more."""
    if first.add is not None:
        graph.remove(first.add, safe=True)
    graph.remove(first.node, safe=True)
    forget(graph, [first.weight, *([] if first.bias is None else [first.bias]), *given])
