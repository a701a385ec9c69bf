"""Reshape(x, shape computed from shapes) => Reshape(x, constant), and none where nothing changes.

A size that stays is 0 in the constant, one that is computed is -1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from thesean.deploy.lowering.lean.edit import Value, dims, ints, is_kind, replace, small

if TYPE_CHECKING:
    import onnx_ir as ir


def reshape_by_constant(model: ir.Model) -> int:
    changed = 0
    for node in list(model.graph):
        if not is_kind(node, "Reshape") or node.inputs[0] is None:
            continue
        value: Value = node.inputs[0]
        made = node.outputs[0]
        inner = value.producer()
        before, after = dims(value), dims(made)
        if inner is not None and is_kind(inner, "Reshape") and dims(inner.inputs[0]) == after and after is not None:
            value = inner.inputs[0]  # there and back
            before = after
        if before is None or after is None:
            continue
        named = value.is_graph_input() or value.is_graph_output() or value.is_initializer()
        if before == after and not (made.is_graph_output() and named):
            replace(made, value)
            model.graph.remove(node, safe=True)
            changed += 1
            continue
        target = _target(before, after)
        if target is None:
            continue
        was = small(node.inputs[1])
        if was is None or "allowzero" in node.attributes or not np.array_equal(was, target):
            node.replace_input_with(1, ints(model.graph, *target))
            node.attributes.pop("allowzero", None)
            changed += was is None
    return changed


def _target(before: list[int | str], after: list[int | str]) -> list[int] | None:
    """None where more than one size would have to be computed, or one that may be 0 leaves another one unknown."""
    target: list[int] = []
    for index, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif index < len(before) and before[index] == size:
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1 or 0 in [size for size in after if isinstance(size, int)]:
        return None
    # -1 is what is left after a division by the others: none of them may be a past that is still empty
    empty = any(isinstance(size, str) and "past" in size for size, t in zip(after, target, strict=True) if t == 0)
    return None if -1 in target and empty else target
