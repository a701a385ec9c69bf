"""One call of an operator, taken apart on tensors of its sizes."""

from __future__ import annotations

import torch
from torch import nn

from tests.models import vectors
from thesean.passes.capture.capture import capture
from thesean.passes.graph.trace_call import trace_call

aten = torch.ops.aten


def test_a_call_that_torch_fails_at_is_none_and_nothing_is_written(capfd):
    guide = capture(nn.ZeroPad2d((0, 0, 1, -1)).eval(), vectors(3, 5, 4))
    (pad,) = guide.graph_module.graph.find_nodes(op="call_function", target=aten.pad.default)
    with torch.no_grad():
        assert trace_call(pad, aten.pad.default, {}) is None
    assert "failed while" not in capfd.readouterr().err


def test_a_call_becomes_the_operators_that_it_is_composed_of():
    guide = capture(nn.SiLU().eval(), vectors(3, 5, 4))
    (silu,) = guide.graph_module.graph.find_nodes(op="call_function", target=aten.silu.default)
    table = {aten.silu.default: torch._decomp.decomposition_table[aten.silu.default]}
    made = trace_call(silu, aten.silu.default, table)
    assert made is not None
    assert aten.sigmoid.default in {n.target for n in made.graph.nodes}
