"""Heads that are each divided by a number of their own, then flattened => one quotient of flat rows.

The number of each head is written once for each of its columns by a product with ones and zeros: two nodes for four,
and in a prompt half of the time (4 heads of 32, 512 steps: 32 microseconds for 64). The ones have three dimensions, as
no weight has: quantising takes weights alone.

B batch, T time, H heads, K columns of a head
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    Node,
    Value,
    constant,
    dims,
    insert,
    is_kind,
    producer,
    replace,
    shaped,
    small,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGEST = 2**14  # of the ones and zeros; past it the product takes what it saves


def divide_rows(model: ir.Model) -> int:
    """Reshape(Reshape(x_BTX) / (Reshape(n_BTH) + c)) => x_BTX / ((n_BTH + c) ones_HX), X = H K; c may be missing."""
    import onnx_ir as ir

    changed = 0
    for node in list(model.graph):
        quotient = producer(node.inputs[0], "Div") if is_kind(node, "Reshape") else None
        heads = None if quotient is None else dims(quotient.outputs[0])
        if quotient is None or heads is None or len(heads) != 4 or not all(isinstance(d, int) for d in heads[2:]):
            continue
        (count, width), flat = heads[2:], [*heads[:2], heads[2] * heads[3]]
        above, below = producer(quotient.inputs[0], "Reshape"), _numbers(quotient.inputs[1], heads)
        if above is None or below is None or dims(above.inputs[0]) != flat or dims(node.outputs[0]) != flat:
            continue
        number_BTH, nodes = below
        if number_BTH.dtype != ir.DataType.FLOAT or count * count * width > _LARGEST:
            continue
        for old in reversed(nodes[:-1]):  # the sum, of flat rows too
            added = next(v for v in old.inputs if small(v) is not None)
            (number_BTH,) = insert(old, "Add", [number_BTH, added], like=[number_BTH])
        ones_HX = np.kron(np.eye(count, dtype=np.float32), np.ones((1, width), np.float32))[None]
        ones = constant(model.graph, f"ones_{count}_{width}", ones_HX)
        like = shaped(node.outputs[0], *flat)
        (spread,) = insert(node, "MatMul", [number_BTH, ones], like=[like], of=quotient)
        (made,) = insert(node, "Div", [above.inputs[0], spread], like=[like], of=quotient)
        replace(node.outputs[0], made)
        model.graph.remove([node, quotient, above, *nodes], safe=True)
        changed += 1
    return changed


def _numbers(value: Value, heads: list[int | str]) -> tuple[Value, list[Node]] | None:
    """n_BTH of one number a head, and the nodes behind it, the last one first: a sum with a scalar, if there is one."""
    nodes: list[Node] = []
    add = producer(value, "Add")
    if add is not None:
        parts = [small(v) for v in add.inputs]
        at = next((i for i, part in enumerate(parts) if part is not None and part.size == 1), None)
        if at is None:
            return None
        nodes, value = [add], add.inputs[1 - at]
    view = producer(value, "Reshape")
    if view is None or dims(view.outputs[0]) != [*heads[:3], 1] or dims(view.inputs[0]) != heads[:3]:
        return None
    return view.inputs[0], [*nodes, view]
