"""B batch, T time, H heads"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from tests import remembering_guides
from tests.models import seeded, tokens, vectors
from tests.remembering_guides import (
    DeltaNet,
    DeltaNetOfFeatures,
    Scanned,
    StateSpace,
    chunk_rule,
    dual_scan,
    remembering,
    scan,
)
from thesean.errors import CaptureError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.convention import check_same
from thesean.passes.graph.opaque_memories import GATED_DELTA_RULE, MEMORIES, SELECTIVE_SCAN, STATE_SPACE


def rules(graph_module: Any) -> int:
    return sum(node.target in MEMORIES for node in graph_module.graph.nodes)


@pytest.mark.parametrize(
    ("memory", "operator"),
    [
        (DeltaNet, GATED_DELTA_RULE),
        (DeltaNetOfFeatures, GATED_DELTA_RULE),
        (StateSpace, STATE_SPACE),
        (Scanned, SELECTIVE_SCAN),
    ],
)
def test_a_loop_over_steps_is_one_operator_at_any_length(memory: type[nn.Module], operator: Any):
    before = dict(vars(remembering_guides))
    guide = remembering(memory)
    found = capture(guide, tokens(2, 9))
    assert [n.target for n in found.graph_module.graph.nodes if n.target in MEMORIES] == [operator]
    assert found.signature.symbols == ("batch", "time")
    assert vars(remembering_guides) == before  # all were put back
    for steps in (1, 5, 130):
        ids = tokens(2, steps, seed=steps)
        torch.testing.assert_close(found.graph_module(ids), guide(ids), rtol=1e-4, atol=1e-5)


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
    return remembering_guides.chunk_rule(q, k, v, g, beta, 64, initial_state, output_final_state)


def without_decay(q, k, v, g, beta, initial_state=None, output_final_state=False):
    return remembering_guides.chunk_rule(q, k, v, g * 0, beta)  # a place that the guide's classes don't name


def of_one_value(q, k, v, g, beta, initial_state=None, output_final_state=False):
    return remembering_guides.chunk_rule(q, k, v, g, beta)[0]


def that_fails(q, k, v, g, beta, initial_state=None, output_final_state=False):
    if q.shape[1] != 9:
        raise ValueError("of nine steps alone")
    return remembering_guides.chunk_rule(q, k, v, g, beta)


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


def reading_more(q, k, v, g, beta, initial_state=None, output_final_state=False, **kwargs):
    return remembering_guides.chunk_rule(q * kwargs.get("scale", 1.0), k, v, g, beta)


@pytest.mark.parametrize(("rule", "count"), [(chunk_rule, 1), (reading_more, 0)])
def test_what_else_is_given_matters_where_the_function_looks_at_it(rule, count: int):
    guide = Held(rule, scale=2.0).eval()
    found = capture(guide, vectors(2, 9, 8))
    assert rules(found.graph_module) == count
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


def test_a_call_that_asks_for_more_is_traced_as_it_is():
    guide = Anew(chunk_rule).eval()
    found = capture(guide, vectors(2, 9, 8))
    assert rules(found.graph_module) == 0
    x = vectors(2, 9, 8, seed=1)
    torch.testing.assert_close(found.graph_module(x), guide(x))


@pytest.mark.parametrize("memory", [DeltaNet, DeltaNetOfFeatures, StateSpace])
def test_half_precision_is_what_the_function_makes_of_it(memory: type[nn.Module]):
    guide = seeded(memory).bfloat16()
    found = capture(guide, vectors(2, 9, 16).bfloat16())
    assert rules(found.graph_module) == 1
    x = vectors(2, 9, 16, seed=1).bfloat16()
    torch.testing.assert_close(found.graph_module(x), guide(x), rtol=0.02, atol=0.02)


def test_doubles_are_the_functions_own():
    guide = seeded(Held, named_otherwise).double()
    found = capture(guide, vectors(2, 9, 8).double())
    assert rules(found.graph_module) == 0
    x = vectors(2, 9, 8, seed=1).double()
    torch.testing.assert_close(found.graph_module(x), guide(x))


class Dual(nn.Module):
    def __init__(self, function: Any, **given: Any) -> None:
        super().__init__()
        self.function, self.given, self.skip = function, given, nn.Parameter(torch.ones(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4))
        rates = x[..., :2].sigmoid(), -self.skip[:, 0].exp()
        out = self.function(heads, *rates, heads, heads, 4, **{"D": self.skip[:, 0], **self.given})
        return (out[0] if isinstance(out, tuple) else out).flatten(2)


def gated_at_the_end(*given: Any, **named: Any) -> torch.Tensor:
    return torch.tanh(remembering_guides.dual_scan(*given, **named))


gated_at_the_end.__signature__ = inspect.signature(dual_scan)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("guide", "count"),
    [
        (Dual(dual_scan), 1),
        (Dual(dual_scan, D=None, dt_softplus=True), 1),
        (Dual(dual_scan, return_final_states=True), 0),
        (Dual(dual_scan, initial_states=torch.ones(1, 2, 4, 4)), 0),
        (Dual(dual_scan, seq_idx=torch.zeros(9)), 1),
        (Dual(gated_at_the_end), 0),
    ],
    ids=["plain", "other settings", "its state", "from a state", "what it never looks at", "something else"],
)
def test_a_state_space_is_the_operator_where_it_is_called_for_nothing_else(guide: nn.Module, count: int):
    found = capture(guide.eval(), vectors(2, 9, 8))
    assert rules(found.graph_module) == count
    x = vectors(2, 9, 8, seed=1)
    torch.testing.assert_close(found.graph_module(x), guide(x), rtol=1e-4, atol=1e-5)


def test_skips_of_another_shape_are_the_functions_own():
    whole = MEMORY_OF_EACH_CHANNEL
    assert rules(capture(whole, vectors(2, 9, 8)).graph_module) == 0


class OfEachChannel(Dual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4))
        return self.function(heads, x[..., :2].sigmoid(), -self.skip[:, 0].exp(), heads, heads, 4, D=self.skip).flatten(
            2
        )


def skipping(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk_size: int,
             D: Any = None, dt_bias: Any = None, initial_states: Any = None, dt_softplus: bool = False,
             dt_limit: Any = (0.0, float("inf"))) -> torch.Tensor:  # fmt: skip
    out = remembering_guides.dual_scan(x, dt, A, B, C, chunk_size, None, dt_bias, None, dt_softplus, dt_limit)
    return out if D is None else out + (D if D.ndim == 2 else D[:, None]) * x


MEMORY_OF_EACH_CHANNEL = OfEachChannel(skipping).eval()


def test_the_last_state_of_a_scan_is_the_functions_own():
    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = x.transpose(1, 2)
            rates = turned.sigmoid(), -torch.ones(8, 8)
            out, last = scan(turned, *rates, turned, turned, return_last_state=True)
            return out.transpose(1, 2) + last.sum((1, 2)).view(-1, 1, 1)

    guide = Last().eval()
    found = capture(guide, vectors(2, 9, 8))
    assert rules(found.graph_module) == 0
    x = vectors(2, 9, 8, seed=1)
    torch.testing.assert_close(found.graph_module(x), guide(x), rtol=1e-4, atol=1e-5)


def test_a_function_of_one_value_does_not_follow_the_convention():
    class One(Held):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.unflatten(-1, (2, 4))
            return self.rule(heads, heads / 4, heads, -self.decay(x).exp(), self.beta(x).sigmoid()).flatten(2)

    found = capture(seeded(One, of_one_value), vectors(2, 9, 8))
    assert rules(found.graph_module) == 0
    assert "initial_state" in inspect.signature(of_one_value).parameters


class Loud(nn.Module):
    """A delta rule whose outputs are large and cancel, so that the order of sums is seen."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.memory, self.off = DeltaNet(), off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 3e3 * self.memory(x)
        return (y - y.mean(1, keepdim=True)) * (1 + self.off)


def test_another_order_of_sums_is_no_disagreement_and_another_number_is():
    guide = seeded(Loud)
    x = 10 * vectors(2, 60, 16)
    found = capture(guide, x)
    assert rules(found.graph_module) == 1
    wanted, got = guide(x), found.graph_module(x)
    assert not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)  # what is asked of others
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    off = seeded(Loud, 1e-3)
    with torch.no_grad(), pytest.raises(CaptureError, match="disagrees with the guide"):
        check_same(found, lambda inputs: off(inputs["x"]))
