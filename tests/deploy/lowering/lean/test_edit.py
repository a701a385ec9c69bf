"""What passes on an ONNX graph add to it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from thesean.deploy.lowering.lean.edit import constant, ints


def test_a_constant_is_one_of_its_kind_and_another_of_its_name_stays_what_it_is():
    graph = ir.Graph([], [], nodes=[])
    first = ints(graph, 4, -1)
    assert ints(graph, 4, -1) is first
    other = constant(graph, first.name, np.array([7.0]))
    assert other.name != first.name
    assert {v.const_value.numpy().tolist()[0] for v in (first, other)} == {4, 7.0}
