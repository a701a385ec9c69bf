"""x W1 + b1, x W2 + b2, ... => Split(x [W1 W2 ...] + [b1 b2 ...]): one product instead of several of the same input."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    Node,
    Value,
    constant,
    dims,
    insert,
    ints,
    is_kind,
    is_private,
    lazily,
    other,
    reader,
    replace,
    shaped,
    weight,
)
from thesean.deploy.lowering.lean.fold_weights import FOLDED, forget

if TYPE_CHECKING:
    import onnx_ir as ir


_LARGER = 8  # times the size of a weight that may be


class Product(NamedTuple):
    node: Node
    weight: Value
    add: Node | None
    bias: Value | None

    @property
    def made(self) -> Value:
        made: Value = (self.node if self.add is None else self.add).outputs[0]
        return made

    @property
    def columns(self) -> int:
        return int(self.weight.shape[1])


def join_products(model: ir.Model) -> int:
    changed = 0
    by_input: dict[int, list[Product]] = {}
    for node in model.graph:
        if is_kind(node, "MatMul") and dims(node.inputs[0]) and (found := product_of(node)) is not None:
            by_input.setdefault(id(node.inputs[0]), []).append(found)
    for products in map(_joinable, by_input.values()):
        if len(products) > 1 and len({p.node.inputs[0].dtype for p in products}) == 1:
            _join(model.graph, products)
            changed += 1
    return changed


def _joinable(products: list[Product]) -> list[Product]:
    """Without those whose weight is another node's too, unless it is small beside the others: it will be written
    twice.
    """
    own = sum(p.weight.const_value.size for p in products if is_private(p.weight))
    return [p for p in products if is_private(p.weight) or _LARGER * p.weight.const_value.size <= own]


def product_of(node: Node) -> Product | None:
    """None for a product of two values, or of one by several matrices, and for one that the graph gives away."""
    x, matrix = node.inputs
    size = dims(matrix)
    if x is None or matrix is None or not matrix.is_initializer():
        return None
    if size is None or len(size) != 2 or x.is_initializer() or node.outputs[0].is_graph_output():
        return None
    add = reader(node.outputs[0], "Add")
    bias = None if add is None else other(add, node.outputs[0])
    if add is None or bias is None or not bias.is_initializer() or dims(bias) != [size[1]]:
        return Product(node, matrix, None, None)
    return None if add.outputs[0].is_graph_output() else Product(node, matrix, add, bias)


def _join(graph: ir.Graph, products: list[Product]) -> None:
    first, x = products[0].node, products[0].node.inputs[0]
    rows, columns = int(products[0].weight.shape[0]), [p.columns for p in products]
    front = dims(products[0].made)[:-1]
    matrices, dtype = [p.weight.const_value for p in products], products[0].weight.dtype
    name = "+".join(str(p.weight.name).removesuffix(FOLDED) for p in products)
    joined = weight(
        graph, name, lazily(lambda: np.concatenate([m.numpy() for m in matrices], 1), dtype, [rows, sum(columns)])
    )
    whole = shaped(products[0].made, *front, sum(columns))
    (made,) = insert(first, "MatMul", [x, joined], like=[whole])
    if any(p.bias is not None for p in products):
        biases = [
            np.zeros(p.columns, dtype.numpy()) if p.bias is None else p.bias.const_value.numpy() for p in products
        ]
        (made,) = insert(first, "Add", [made, constant(graph, f"{name}.bias", np.concatenate(biases))], like=[whole])
    outputs = insert(
        first, "Split", [made, ints(graph, *columns)], {"axis": len(front)}, like=[p.made for p in products]
    )
    for product, output in zip(products, outputs, strict=True):
        replace(product.made, output)
        given = [v for v in (product.weight, product.bias) if v is not None]
        if product.add is not None:
            graph.remove(product.add, safe=True)
        graph.remove(product.node, safe=True)
        forget(graph, given)
