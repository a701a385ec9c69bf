"""Parts of a row that are all made heads and transposed => the whole is, and cut between heads afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thesean.deploy.lowering.lean.edit import dims, insert, ints, is_kind, number, reader, replace, shaped

if TYPE_CHECKING:
    import onnx_ir as ir

_BY_HEAD = [0, 2, 1, 3]


def split_later(model: ir.Model) -> int:
    changed = 0
    for node in list(model.graph):
        rows = dims(node.inputs[0] if node.inputs else None)
        if not is_kind(node, "Split") or rows is None or len(rows) != 3 or number(node, "axis", 0) not in (-1, 2):
            continue
        views: list[Any] = [reader(part, "Reshape") for part in node.outputs]
        turns: list[Any] = [None if view is None else reader(view.outputs[0], "Transpose") for view in views]
        if any(t is None or list(number(t, "perm", [])) != _BY_HEAD for t in turns):
            continue
        shapes = [dims(view.outputs[0]) for view in views]
        if any(s is None or len(s) != 4 or s[:2] != rows[:2] for s in shapes) or len({s[3] for s in shapes}) > 1:
            continue
        heads, width = [s[2] for s in shapes], shapes[0][3]
        if not all(isinstance(d, int) for d in (*heads, width)) or sum(heads) * width != rows[2]:
            continue
        (batch, time), total = rows[:2], sum(heads)
        apart = ints(model.graph, 0, 0, total, width)
        like = shaped(node.inputs[0], batch, time, total, width)
        (whole,) = insert(node, "Reshape", [node.inputs[0], apart], like=[like])
        like = shaped(whole, batch, total, time, width)
        (turned,) = insert(node, "Transpose", [whole], {"perm": _BY_HEAD}, like=[like])
        olds = [t.outputs[0] for t in turns]
        parts = insert(node, "Split", [turned, ints(model.graph, *heads)], {"axis": 1}, like=olds)
        for old, part in zip(olds, parts, strict=True):
            replace(old, part)
        model.graph.remove([*turns, *views, node], safe=True)
        changed += 1
    return changed
