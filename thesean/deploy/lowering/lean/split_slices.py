"""Slices that take a value apart => Split; and a slice of what was joined => the part that it is.

Split writes all its outputs in one go, and joined values that are taken apart again need not be joined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from thesean.deploy.lowering.lean.edit import Node, Value, dims, insert, ints, is_kind, number, piece, replace

if TYPE_CHECKING:
    import onnx_ir as ir


class Cut(NamedTuple):
    node: Node
    axis: int
    start: int
    end: int


def split_slices(model: ir.Model) -> int:
    return _parts_of_joined(model) + _splits(model)


def _cut(node: Node) -> Cut | None:
    """A slice by constants along one axis of known size."""
    found = piece(node)
    if found is None:
        return None
    start, end, axis, step = found
    length = dims(node.inputs[0])[axis]
    if step != 1 or not isinstance(length, int):
        return None
    start, end = (min(max(i + length if i < 0 else i, 0), length) for i in (start, end))
    return Cut(node, axis, start, end) if start < end else None


def _parts_of_joined(model: ir.Model) -> int:
    changed = 0
    node: Node
    for node in list(model.graph):
        cut = _cut(node)
        joined = None if cut is None else node.inputs[0].producer()
        if cut is None or joined is None or not is_kind(joined, "Concat"):
            continue
        if number(joined, "axis", 0) % len(dims(node.inputs[0]) or [0]) != cut.axis:
            continue
        start = 0
        for part in joined.inputs:
            size = dims(part)
            if size is None or not isinstance(size[cut.axis], int):
                break
            if (start, start + size[cut.axis]) == (cut.start, cut.end) and not node.outputs[0].is_graph_output():
                replace(node.outputs[0], part)
                model.graph.remove(node, safe=True)
                changed += 1
                break
            start += size[cut.axis]
        if not joined.outputs[0].uses() and not joined.outputs[0].is_graph_output():
            model.graph.remove(joined, safe=True)
    return changed


def _splits(model: ir.Model) -> int:
    changed = 0
    values: list[Value] = list({id(n.inputs[0]): n.inputs[0] for n in model.graph if is_kind(n, "Slice")}.values())
    for value in values:
        cuts = [cut for n in value.consumers() if (cut := _cut(n)) is not None and n.inputs[0] is value]
        for axis in {cut.axis for cut in cuts}:
            along = sorted((cut for cut in cuts if cut.axis == axis), key=lambda cut: cut.start)
            edges = [0, *(cut.end for cut in along)]
            if len(along) < 2 or [cut.start for cut in along] != edges[:-1] or edges[-1] != dims(value)[axis]:
                continue
            first = next(node for node in model.graph if any(cut.node is node for cut in along))
            sizes = ints(model.graph, *(cut.end - cut.start for cut in along))
            made = insert(first, "Split", [value, sizes], {"axis": axis}, like=[c.node.outputs[0] for c in along])
            for cut, part in zip(along, made, strict=True):
                replace(cut.node.outputs[0], part)
                model.graph.remove(cut.node, safe=True)
            values += made  # which may have been sliced as well
            changed += 1
    return changed
