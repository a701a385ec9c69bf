"""DFT(X, n, inverse, onesided) => Re DFT(w X, n, inverse), w 1 at the frequencies 0 and n / 2 and 2 between.

onnxruntime infers n / 2 + 1 steps for the output of a one-sided inverse, which are n, and then refuses to run where it
gives that memory to something else (1.32).

F n / 2 + 1 frequencies
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from thesean.deploy.lowering.lean.edit import Node, Value, constant, insert, ints, is_kind, number, replace, small

if TYPE_CHECKING:
    import onnx_ir as ir


def whole_spectra(model: ir.Model) -> int:
    """Write them out wherever they are; how many there were."""
    changed = 0
    for graph in model.graphs():
        for node in list(graph):
            axis = _axis(node)
            if axis is not None:
                _write(graph, node, axis)
                graph.remove(node, safe=True)
                changed += 1
    return changed


def _axis(node: Node) -> int | None:
    """Of a one-sided inverse whose sizes are known well enough to be written out: the dimension it runs along."""
    if not is_kind(node, "DFT") or not number(node, "inverse", 0) or not number(node, "onesided", 0):
        return None
    spectrum, length = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    axis = number(node, "axis", 1)  # before opset 20
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        found = small(node.inputs[2])
        axis = None if found is None else int(found.reshape(()))
    if axis is None or length is None or spectrum.shape is None:
        return None
    return int(axis) % len(spectrum.shape)


def _write(graph: ir.Graph, node: Node, axis: int) -> None:
    import onnx_ir as ir

    spectrum, length, *rest = node.inputs
    whole, flags = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)

    def put(kind: str, *inputs: Value, type_: ir.TypeProtocol | None = None, **attributes: int) -> Value:
        like = ir.Value(name=node.outputs[0].name, type=type_ or spectrum.type)
        return insert(node, kind, inputs, attributes, like=[like])[0]

    zero, one, two = (constant(graph, f"int_{n}", np.array(n, np.int64)) for n in range(3))
    count = put("Squeeze", put("Shape", spectrum, type_=whole, start=axis, end=axis + 1), ints(graph, 0), type_=whole)
    step_F = put("Range", zero, count, one, type_=whole)
    first_F = put("Equal", step_F, zero, type_=flags)
    middle_F = put("Equal", put("Mul", step_F, two, type_=whole), length, type_=flags)
    once_F = put("Or", first_F, middle_F, type_=flags)
    dtype = spectrum.dtype.numpy()
    once, twice = (constant(graph, f"{dtype}_{n}", np.array(n, dtype)) for n in (1, 2))
    behind = range(1, len(spectrum.shape) - axis)
    weight = put("Unsqueeze", put("Where", once_F, once, twice), ints(graph, *behind))
    attributes: dict[str, Any] = {"inverse": 1, **({} if rest else {"axis": axis})}
    both = put("DFT", put("Mul", spectrum, weight), length, *rest, **attributes)
    real = put("Slice", both, ints(graph, 0), ints(graph, 1), ints(graph, -1))
    _forget_sizes(node.outputs[0])
    replace(node.outputs[0], real)


def _forget_sizes(value: Value) -> None:
    """What was inferred from the wrong one: as far as its dimensions are told one by one."""
    rank = None if value.shape is None else len(value.shape)
    reached = [value]
    while reached:
        value = reached.pop()
        if rank is None or value.shape is None or len(value.shape) != rank or value.is_graph_output():
            continue
        value.shape = None
        reached += [out for user in value.consumers() for out in user.outputs]
