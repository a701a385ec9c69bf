"""Tables whose rows are looked up, embeddings that is, by whole numbers of 8 bits. One that is the head too is once in
a file and not twice: rows are looked up where products read them.

N rows, K features, G blocks of B features that have one scale
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    MICROSOFT,
    Node,
    Value,
    insert,
    ints,
    is_kind,
    number,
    replace,
    shaped,
    weight,
)
from thesean.deploy.lowering.lean.fold_weights import forget

if TYPE_CHECKING:
    import onnx_ir as ir

_BITS = 8
_BLOCK = 32  # features of one scale

# between what the caller gives and a lookup: other kinds compute, and what is looked up by what a file computes are
# positions, of tables that turn by an angle too
_THE_SAME = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def looked_up(model: ir.Model) -> Iterator[Value]:
    """Those of floats whose rows are looked up by whole numbers that the caller gives, and that nothing else reads."""
    import onnx_ir as ir

    for table in list(model.graph.initializers.values()):
        held, readers = table.const_value, _readers(table)
        if held is None or held.dtype != ir.DataType.FLOAT or len(held.shape) != 2 or not held.size:
            continue
        if readers and all(_is_given(node.inputs[1]) for node in readers):
            yield table


def round_tables(model: ir.Model) -> None:
    """Whole numbers and scales in place of each table that is `looked_up`."""
    import onnx_ir as ir

    for table in list(looked_up(model)):
        assert table.const_value is not None
        level_NK, scale_NG = _rounded(table.const_value.numpy())
        made = (("levels", level_NK), ("scales", scale_NG))
        levels, scales = (weight(model.graph, f"{table.name}.{what}", ir.Tensor(array)) for what, array in made)
        _look_up_in(levels, scales, _BLOCK, _readers(table))
        forget(model.graph, [table])


def _rounded(table_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels around 128, and a scale for each block of a row, the last of which may be shorter."""
    rows, features = table_NK.shape
    blocks_NGB = np.pad(table_NK, ((0, 0), (0, -features % _BLOCK))).reshape(rows, -1, _BLOCK)
    half = 2 ** (_BITS - 1)
    scale_NG = np.abs(blocks_NGB).max(-1) / (half - 1)
    safe_NG1 = np.where(scale_NG, scale_NG, 1)[..., None]
    level_NK = np.rint(blocks_NGB / safe_NG1).reshape(rows, -1)[:, :features] + half
    return level_NK.astype(np.uint8), scale_NG


def _is_given(value: Value | None) -> bool:
    while value is not None and not value.is_graph_input():
        node = value.producer()
        value = node.inputs[0] if node is not None and is_kind(node, *_THE_SAME) else None
    return value is not None


def _readers(table: Value) -> list[Node]:
    """The nodes that look up rows of a table; none where anything else reads it."""
    readers: list[Node] = [user for user, _ in table.uses()]
    ours = all(is_kind(n, "Gather") and n.inputs[0] is table and number(n, "axis", 0) == 0 for n in readers)
    return readers if ours and not table.is_graph_output() else []


def look_up_whole_numbers(model: ir.Model, tables: Mapping[str, str]) -> None:
    """`tables`, by the names that products of floats had: what is looked up in a table of floats is looked up where
    onnxruntime's product of 8 bits has its rows. A table stays where something else reads it, or a row is no whole
    blocks.
    """
    for node in list(model.graph):
        name = tables.get(str(node.name).removesuffix(f"_Q{_BITS}"), "")
        if table := model.graph.initializers.get(name):  # another product may have had it
            _look_up(model.graph, node, table)


def _look_up(graph: ir.Graph, product: Node, table: Value) -> None:
    block, features = (int(number(product, name, 0)) for name in ("block_size", "K"))
    readers = _readers(table)
    if not readers or features % block or len(product.inputs) > 3:
        return
    _, levels, scales = product.inputs
    rows = int(number(product, "N", 0))
    first = next(node for node in graph if node in readers)
    like = shaped(levels, rows, features)
    (whole,) = insert(first, "Reshape", [levels, ints(graph, rows, features)], like=[like])
    _look_up_in(whole, scales, block, readers)
    forget(graph, [table])


def _look_up_in(levels: Value, scales: Value, block: int, readers: list[Node]) -> None:
    told = {"bits": _BITS, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    for node in readers:
        given = [levels, node.inputs[1], scales]
        (found,) = insert(node, "GatherBlockQuantized", given, told, like=[node.outputs[0]], domain=MICROSOFT)
        found.producer().name = f"{node.name}_Q{_BITS}"
        replace(node.outputs[0], found)
        found.producer().graph.remove(node, safe=True)
