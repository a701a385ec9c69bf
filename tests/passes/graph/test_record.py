"""B batch, T time, H heads, K head width"""

from __future__ import annotations

import torch

from tests.captured import traced
from tests.models import vectors
from thesean.passes.graph.record import evaluate, record


class Viewed(torch.nn.Module):
    """Heads behind time, then joined by a view, which takes no other strides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_BHTK = x.unflatten(-1, (2, 3)).transpose(1, 2) * 2
        return x_BHTK.transpose(1, 2).view(2, 5, 6)


def test_numbers_of_ones_own_are_laid_out_as_those_that_were_recorded():
    graph_module = traced(Viewed(), vectors(2, 5, 6))
    values = record(graph_module, {"x": vectors(2, 5, 6)})
    (product,) = (n for n in graph_module.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    (output,) = graph_module.graph.output_node().all_input_nodes
    run = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    given_BHTK = vectors(2, 2, 5, 3, seed=1).contiguous()
    assert values[product].stride() != given_BHTK.stride()
    found = evaluate(run[run.index(product) + 1 :], values, {product: given_BHTK}, output)
    assert torch.equal(found, given_BHTK.transpose(1, 2).reshape(2, 5, 6))
