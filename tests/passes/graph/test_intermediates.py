from __future__ import annotations

import torch

from tests import captured
from tests.models import tokens, vectors
from thesean.passes.graph.intermediates import intermediates


def test_named_values_come_beside_the_output():
    guide = captured.mlp().graph_module
    x = vectors(2, 8)
    values = intermediates(guide, ["relu", "linear_1"])(x)
    assert set(values) == {"output", "relu", "linear_1"}
    assert torch.equal(values["output"], guide(x))
    expected = torch.relu(torch.nn.functional.linear(x, guide.get_parameter("0.weight"), guide.get_parameter("0.bias")))
    assert torch.equal(values["relu"], expected)


def test_without_the_output_nothing_past_the_named_nodes_is_computed():
    guide = captured.mlp().graph_module
    prefix = intermediates(guide, ["relu"], with_output=False)
    assert [n.name for n in prefix.graph.nodes if n.op == "call_function"] == ["linear", "relu"]
    assert set(prefix(vectors(2, 8))) == {"relu"}


def test_parameters_are_shared_so_that_gradients_arrive():
    guide = captured.mlp().graph_module
    part = intermediates(guide, ["relu"], with_output=False)
    assert part.get_parameter("0.weight") is guide.get_parameter("0.weight")


def test_a_name_given_twice_is_one_value_and_the_graph_stays():
    guide = captured.gpt2().graph_module
    before = [n.name for n in guide.graph.nodes]
    last = [n.name for n in guide.graph.nodes if n.op == "call_function"][-1]
    values = intermediates(guide, [last, last])(tokens(2, 5))
    assert set(values) == {"output", last}
    assert [n.name for n in guide.graph.nodes] == before
