"""What passes on an ONNX graph add to it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from thesean.deploy.lowering.lean.edit import constant, insert, ints


def test_a_constant_is_one_of_its_kind_and_another_of_its_name_stays_what_it_is():
    graph = ir.Graph([], [], nodes=[])
    first = ints(graph, 4, -1)
    assert ints(graph, 4, -1) is first
    other = constant(graph, first.name, np.array([7.0]))
    assert other.name != first.name
    assert {v.const_value.numpy().tolist()[0] for v in (first, other)} == {4, 7.0}


def test_a_file_that_was_edited_before_has_names_of_its_own():
    """As one that is made lean, saved, read again and quantised."""
    x, y = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2])) for n in "xy")
    graph = ir.Graph([x], [y], nodes=[ir.node("Relu", [x], outputs=[y])], opset_imports={"": 20})
    insert(graph[0], "Abs", [x], like=[y])
    read = ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=10))).graph
    insert(read[-1], "Neg", [read.inputs[0]], like=[read.outputs[0]])
    names = [value.name for node in read for value in node.outputs]
    assert len(set(names)) == len(names) == 3
