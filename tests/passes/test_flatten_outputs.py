from __future__ import annotations

import torch
from torch import nn

from tests.models import vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.flatten_outputs import FlattenOutputs
from thesean.passes.graph.text import text


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> dict:
        h = self.layer(x)
        return {"a": h, "b": (h.exp(), [h.tanh()])}


def test_nested_outputs_become_one_tuple_in_order():
    guide = capture(Nested(), vectors(2, 3)).graph_module
    before = text(guide.graph)
    assert before[-1] == "return {'a': linear, 'b': (exp, [tanh])}"
    flat = FlattenOutputs()(guide).graph_module
    assert text(flat.graph) == [*before[:-1], "return (linear, exp, tanh)"]
    assert text(guide.graph) == before
    x = vectors(2, 3, seed=1)
    expected = guide(x)
    assert all(map(torch.equal, flat(x), (expected["a"], expected["b"][0], expected["b"][1][0])))


def test_parameters_are_shared_and_the_mode_is_kept():
    guide = capture(Nested(), vectors(2, 3)).graph_module
    for training in (True, False):
        flat = FlattenOutputs()(guide.train(training)).graph_module
        assert flat.training is training
        assert flat.get_parameter("layer.weight") is guide.get_parameter("layer.weight")


def test_a_single_tensor_becomes_a_tuple_of_one_and_a_flat_tuple_is_left_alone():
    once = FlattenOutputs()(capture(nn.Linear(3, 3), vectors(2, 3)).graph_module)
    assert once.modified
    assert text(once.graph_module.graph)[-1] == "return (linear,)"
    again = FlattenOutputs()(once.graph_module)
    assert again.graph_module is once.graph_module
    assert again.reason == "the output is a flat tuple already"


def example() -> Example:
    return Example(FlattenOutputs(), capture(Nested(), vectors(2, 3)).graph_module, (vectors(2, 3, seed=1),))
