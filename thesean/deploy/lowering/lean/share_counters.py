"""Counters that count alike => one that all read, and what is computed twice from the same values => once.

A layer that turns its keys by their step counts them, and makes a table of cosines and sines of its own: fifteen nodes.
All states start at 0 (see thesean/passes/thread_state.py) and are carried on together. So two of them whose next value
is each its own plus one and the same number are equal at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thesean.deploy.lowering.lean.edit import Node, Value, dims, is_kind, other
from thesean.passes.thread_state import STATE_IN, STATE_OUT

if TYPE_CHECKING:
    import onnx_ir as ir


def share_counters(model: ir.Model) -> int:
    """Each counter is still an input and an output of its own; the first alone is read."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    before = len(model.graph)
    CommonSubexpressionEliminationPass()(model)  # what they count by is the same value where it is the same number
    first: dict[tuple[int, str], Value] = {}
    changed = 0
    for counter, step in _counters(model.graph):
        by = other(step, counter)
        leader = first.setdefault((id(by), str(dims(counter))), counter)
        if leader is not counter:
            changed += _read_instead(counter, leader, step)
    if changed:
        CommonSubexpressionEliminationPass()(model)
    return changed + before - len(model.graph)


def _counters(graph: ir.Graph) -> list[tuple[Value, Node]]:
    """Whole numbers of the state that a sum takes on, and that sum."""
    import onnx_ir as ir

    outputs = {value.name: value for value in graph.outputs}
    found = []
    for value in graph.inputs:
        after = outputs.get(f"{STATE_OUT}{str(value.name).removeprefix(STATE_IN)}")
        step = None if after is None or value.dtype != ir.DataType.INT64 else after.producer()
        if step is not None and is_kind(step, "Add") and any(v is value for v in step.inputs):
            found.append((value, step))
    return found


def _read_instead(counter: Value, leader: Value, step: Node) -> int:
    """Whatever reads the counter, but what takes it on, reads the leader."""
    uses = [(node, index) for node, index in counter.uses() if node is not step]
    for node, index in uses:
        node.replace_input_with(index, leader)
    return len(uses)
