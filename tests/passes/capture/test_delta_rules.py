"""B batch, T time, H heads"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from tests import delta_guides
from tests.delta_guides import DeltaNet, chunk_rule, remembering
from tests.models import seeded, tokens, vectors
from thesean.passes.capture.capture import capture
from thesean.passes.graph.opaque_delta_rule import GATED_DELTA_RULE


def rules(graph_module: Any) -> int:
    return len(list(graph_module.graph.find_nodes(op="call_function", target=GATED_DELTA_RULE)))


def test_a_loop_over_steps_is_one_operator_at_any_length():
    guide = remembering()
    found = capture(guide, tokens(2, 9))
    assert rules(found.graph_module) == 1
    assert found.signature.symbols == ("batch", "time")
    assert delta_guides.chunk_rule is chunk_rule  # it was put back
    for steps in (1, 5, 130):
        ids = tokens(2, steps, seed=steps)
        torch.testing.assert_close(found.graph_module(ids), guide(ids))


class Held(nn.Module):
    """The function is an attribute of the module, as where a kernel may take its place."""

    def __init__(self, rule: Any, **given: Any) -> None:
        super().__init__()
        self.rule, self.given = rule, given
        self.beta, self.decay = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4))
        out = self.rule(
            heads.tanh(), heads.sigmoid() / 2, heads, -self.decay(x).exp(), self.beta(x).sigmoid(), **self.given
        )
        return out[0].flatten(2)


def named_otherwise(q, k, v, g, beta, initial_state=None, output_final_state=False):
    return chunk_rule(q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state)


def without_decay(q, k, v, g, beta, initial_state=None, output_final_state=False):
    return delta_guides.chunk_rule(q, k, v, g * 0, beta)  # a place that the guide's classes don't name


def of_one_value(q, k, v, g, beta, initial_state=None, output_final_state=False):
    return delta_guides.chunk_rule(q, k, v, g, beta)[0]


def that_fails(q, k, v, g, beta, initial_state=None, output_final_state=False):
    if q.shape[1] != 9:
        raise ValueError("of nine steps alone")
    return delta_guides.chunk_rule(q, k, v, g, beta)


@pytest.mark.parametrize("rule", [chunk_rule, named_otherwise])
def test_a_function_is_known_by_its_convention_and_its_numbers_wherever_it_stands(rule):
    guide = seeded(Held, rule)
    found = capture(guide, vectors(2, 9, 8))
    assert rules(found.graph_module) == 1
    assert guide.rule is rule
    x = vectors(3, 14, 8, seed=1)
    torch.testing.assert_close(found.graph_module(x), guide(x))


@pytest.mark.parametrize("rule", [without_decay, that_fails])
def test_one_that_computes_something_else_is_traced_as_it_is(rule):
    guide = seeded(Held, rule)
    found = capture(guide, vectors(2, 9, 8))
    assert rules(found.graph_module) == 0
    x = vectors(2, 9, 8, seed=1)
    torch.testing.assert_close(found.graph_module(x), guide(x))


class Anew(Held):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.ones(x.shape[0], 2, 4, 4)
        heads = x.unflatten(-1, (2, 4))
        out, last = self.rule(
            heads, heads / 4, heads, -self.decay(x).exp(), self.beta(x).sigmoid(), initial_state=state,
            output_final_state=True,
        )  # fmt: skip
        return out.flatten(2) + last.sum((1, 2, 3)).view(-1, 1, 1)


@pytest.mark.parametrize("guide", [Anew(chunk_rule), Held(chunk_rule, scale=2.0)], ids=["a state", "what isn't known"])
def test_a_call_that_asks_for_more_is_traced_as_it_is(guide: nn.Module):
    found = capture(guide.eval(), vectors(2, 9, 8))
    assert rules(found.graph_module) == 0
    x = vectors(2, 9, 8, seed=1)
    torch.testing.assert_close(found.graph_module(x), guide(x))


def test_half_precision_is_what_the_function_makes_of_it():
    guide = DeltaNet().bfloat16().eval()
    found = capture(guide, vectors(2, 9, 16).bfloat16())
    assert rules(found.graph_module) == 1
    x = vectors(2, 9, 16, seed=1).bfloat16()
    torch.testing.assert_close(found.graph_module(x), guide(x), rtol=0.02, atol=0.02)


def test_a_function_of_one_value_does_not_follow_the_convention():
    class One(Held):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.unflatten(-1, (2, 4))
            return self.rule(heads, heads / 4, heads, -self.decay(x).exp(), self.beta(x).sigmoid()).flatten(2)

    found = capture(seeded(One, of_one_value), vectors(2, 9, 8))
    assert rules(found.graph_module) == 0
    assert "initial_state" in inspect.signature(of_one_value).parameters
