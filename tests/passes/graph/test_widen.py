"""B batch, T time, D width"""

from __future__ import annotations

import torch
from torch import fx, nn

from thesean.passes.graph.record import evaluate, record


class Casting(nn.Module):
    """Half-precision weights, one of them read transposed, and a value that is cast down on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.ops.aten.addmm.default(self.first.bias, x, torch.ops.aten.t.default(self.first.weight))
        h = torch.ops.aten._to_copy.default(h * (1 + 2**-12), dtype=torch.bfloat16)
        return torch.ops.aten.linear.default(h, self.last.weight, self.last.bias)


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Casting())


def test_a_wide_record_computes_half_precision_in_float32():
    graph_module = traced()
    x = torch.randn(3, 4).to(torch.bfloat16)
    values = record(graph_module, {"x": x}, wide=True)
    wide = Casting()
    wide.load_state_dict(graph_module.state_dict())
    wide.float()
    want = nn.functional.linear(wide.first(x.float()) * (1 + 2**-12), wide.last.weight, wide.last.bias)
    output = values[graph_module.graph.output_node()]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, want, rtol=1e-6, atol=1e-6)
    assert record(graph_module, {"x": x})[graph_module.graph.output_node()].dtype == torch.bfloat16


def test_a_wide_record_keeps_weights_and_views_of_them_as_they_are():
    graph_module = traced()
    values = record(graph_module, {"x": torch.randn(3, 4).to(torch.bfloat16)}, wide=True)
    weight = graph_module.first.weight
    nodes = [n for n in graph_module.graph.nodes if n.name in ("first_weight", "t_default")]
    assert len(nodes) == 2
    for node in nodes:
        assert values.stored(node).data_ptr() == weight.data_ptr()
        assert values[node].dtype == torch.float32


def test_a_region_is_replayed_as_wide_as_it_was_recorded():
    graph_module = traced()
    values = record(graph_module, {"x": torch.randn(3, 4).to(torch.bfloat16)}, wide=True)
    (output,) = graph_module.graph.output_node().all_input_nodes
    run = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    assert torch.equal(evaluate(run, values, {}, output), values[output])
