"""An embedding that is the head too, once in a file and not twice: rows are looked up where products read them.

N rows, K features, G blocks of B features that have one scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from thesean.deploy.lowering.lean.edit import MICROSOFT, Node, Value, insert, ints, is_kind, number, replace, shaped
from thesean.deploy.lowering.lean.fold_weights import forget

if TYPE_CHECKING:
    import onnx_ir as ir

_BITS = 8


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
    readers: list[Node] = [user for user, _ in table.uses()]
    ours = all(is_kind(n, "Gather") and n.inputs[0] is table and number(n, "axis", 0) == 0 for n in readers)
    if not readers or not ours or features % block or len(product.inputs) > 3 or table.is_graph_output():
        return
    _, levels, scales = product.inputs
    rows = int(number(product, "N", 0))
    first = next(node for node in graph if node in readers)
    like = shaped(levels, rows, features)
    (whole,) = insert(first, "Reshape", [levels, ints(graph, rows, features)], like=[like])
    told = {"bits": _BITS, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    for node in readers:
        given = [whole, node.inputs[1], scales]
        (found,) = insert(node, "GatherBlockQuantized", given, told, like=[node.outputs[0]], domain=MICROSOFT)
        found.producer().name = f"{node.name}_Q{_BITS}"
        replace(node.outputs[0], found)
        graph.remove(node, safe=True)
    forget(graph, [table])
