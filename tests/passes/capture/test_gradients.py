"""Training the graph is training the guide.

B batch, D width
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests import models
from tests.models import vectors
from thesean.passes.capture import gradients
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured

SOMEWHERE = nn.Parameter(torch.linspace(-1, 1, 36).view(6, 6))


class Step(nn.Module):
    def __init__(self, compute: Callable[[Step, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.compute = nn.Linear(6, 6), nn.Linear(6, 6), compute
        self.listed = [nn.Parameter(torch.ones(6)), torch.ones(6)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.compute(self, x))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def capture_of(compute: Callable[[Step, torch.Tensor], torch.Tensor]) -> tuple[Step, Captured]:
    torch.manual_seed(0)
    guide = Step(compute).eval()
    return guide, capture(guide, vectors(4, 6))


def without_gradient(guide: Step, captured: Captured) -> list[set[str]]:
    """Parameters of the guide that get none, in it and in its graph."""
    found = []
    for module in (guide, captured.graph_module):
        for parameter in guide.parameters():
            parameter.grad = None
        module(vectors(4, 6)).square().sum().backward()
        found.append({n for n, p in guide.named_parameters() if p.grad is None or not p.grad.any()})
    return found


def under_no_grad(m: Step, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return m.first(x)


def straight_through(m: Step, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    return y + (torch.round(y) - y).detach()


def by_halves(m: Step, x: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(x.shape)
    y[:, :2] = m.first(x)[:, :2]
    y[:, 2:] = m.first(x)[:, 2:]
    return y


@pytest.mark.parametrize(
    ("compute", "none"),
    [
        (by_halves, set()),
        (lambda m, x: torch.vmap(m.first)(x), set()),
        (under_no_grad, {"first.weight", "first.bias"}),
        (straight_through, set()),
        (lambda m, x: m.first(x).detach(), {"first.weight", "first.bias"}),
        (lambda m, x: F.linear(x, m.first.weight.detach(), m.first.bias), {"first.weight"}),
    ],
)
def test_gradients_stop_where_the_guides_do_and_nowhere_else(compute, none):
    guide, captured = capture_of(compute)
    assert captured.untrainable == ""
    assert without_gradient(guide, captured) == [none, none]


class Kept(nn.Linear):
    """What it computes goes through a buffer, as keys and values through one that is served from."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("held", torch.zeros(9, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.held[: x.shape[0]] = super().forward(x)
        return self.held[: x.shape[0]] * 2


def test_what_goes_through_a_buffer_of_the_guides_can_be_trained_and_leaves_it_as_it_was():
    guide = models.seeded(Kept)
    captured = capture(guide, vectors(4, 6))
    assert captured.untrainable == ""
    assert guide.held.is_leaf
    assert not guide.held.any()
    assert copy.deepcopy(captured.graph_module)(vectors(4, 6)).requires_grad


def test_a_detach_that_no_parameter_flows_into_goes():
    _, captured = capture_of(lambda m, x: m.first(x.detach()))
    assert not [n for n in captured.graph_module.graph.nodes if "detach" in str(n.target)]


class Biased(nn.Module):
    """Attention whose bias is trained: without gradients torch's kernel lays out what it gives as a view likes. What is
    written into a slice has torch functionalise the graph, and a reshape that could be a view is one then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.map, self.bias = nn.Linear(8, 8), nn.Parameter(torch.zeros(1, 2, 5, 5))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BHTC = self.map(x_BTD).unflatten(2, (2, 4)).transpose(1, 2)
        first = torch.zeros(5, 5)
        first[0, 1:] = 1
        mixed_BHTC = F.scaled_dot_product_attention(x_BHTC, x_BHTC, x_BHTC, attn_mask=self.bias + first)
        return mixed_BHTC.transpose(1, 2).reshape(x_BTD.shape)


def test_a_reshape_that_was_a_view_without_gradients_copies_with_them():
    captured = capture(models.seeded(Biased), vectors(3, 5, 8))
    assert not captured.untrainable
    captured.graph_module(vectors(3, 5, 8)).square().sum().backward()
    assert all(p.grad is not None for p in captured.graph_module.parameters())


def test_a_forward_that_is_without_gradients_throughout_leaves_all_to_be_trained():
    class Quiet(Step):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    guide = Quiet(lambda m, x: m.first(x).detach()).eval()
    capture(guide, vectors(4, 6)).graph_module(vectors(4, 6)).sum().backward()
    assert all(p.grad is not None for p in guide.parameters())


def test_weights_in_a_list_and_a_global_are_parameters_of_the_graph():
    guide, captured = capture_of(lambda m, x: (m.first(x) * m.listed[0] + m.listed[1]) @ SOMEWHERE)
    strangers = {id(p) for p in captured.graph_module.parameters()} - {id(p) for p in guide.parameters()}
    assert strangers == {id(guide.listed[0]), id(SOMEWHERE)}
    loose = torch.randn(6, 6, requires_grad=True)  # no Parameter, and trained all the same
    _, captured = capture_of(lambda m, x: m.first(x) @ loose)
    assert any(torch.equal(p, loose) for p in captured.graph_module.parameters())
    assert not captured.untrainable
    frozen = SOMEWHERE.detach()
    _, captured = capture_of(lambda m, x: m.first(x) @ frozen)
    assert sum(1 for _ in captured.graph_module.parameters()) == 4


def test_parametrised_weights_train_what_they_are_made_of():
    torch.manual_seed(0)
    layers = (f(nn.Linear(6, 6)) for f in (parametrizations.weight_norm, parametrizations.spectral_norm))
    guide = nn.Sequential(*layers, parametrizations.orthogonal(nn.Linear(6, 6))).eval()
    captured = capture(guide, vectors(4, 6))
    assert captured.untrainable == ""
    assert {n for n, _ in captured.graph_module.named_parameters()} == {n for n, _ in guide.named_parameters()}


def test_a_backward_of_ones_own_is_told_with_the_parameters_that_lose_by_it():
    _, captured = capture_of(lambda m, x: Rounded.apply(m.first(x)))
    assert "first.bias, first.weight would get no gradient, past round" in captured.untrainable
    assert "x + (f(x) - x).detach()" in captured.untrainable

    def hooked(m: Step, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        if y.requires_grad:
            y.register_hook(torch.neg)
        return y

    _, captured = capture_of(hooked)
    assert "would get another gradient" in captured.untrainable


class RoundedWeight(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, Rounded.apply(self.weight), self.bias)


@pytest.mark.parametrize("large", [0, 1, 2])
def test_of_many_large_weights_one_of_each_shape_is_compared(monkeypatch, large):
    monkeypatch.setattr(gradients, "_ALWAYS", 0)
    monkeypatch.setattr(gradients, "_SHARE", 1 / 4)
    torch.manual_seed(0)
    widths = [(6, 8), (8, 10), (10, 6)]
    layers = [RoundedWeight(*w) if at == large else nn.Linear(*w) for at, w in enumerate(widths)]
    guide = nn.Sequential(*layers, *(nn.Sequential(nn.Linear(6, 90), nn.Linear(90, 6)) for _ in range(2))).eval()
    assert f"{large}.weight would get no gradient" in capture(guide, vectors(4, 6)).untrainable


def test_what_is_compared_is_small_first_one_of_each_shape_and_each_once(monkeypatch):
    monkeypatch.setattr(gradients, "_ALWAYS", 12)
    small, again, large, last = torch.ones(2), torch.ones(2), torch.ones(2, 3), torch.ones(3)
    chosen = gradients._affordable([large, small, last, again])
    assert [id(p) for p in chosen] == [id(p) for p in (small, last, large)]  # 11 numbers: `again` would be two more
    monkeypatch.setattr(gradients, "_ALWAYS", 13)
    assert gradients._affordable([large, small, last, again])[-1] is again
    monkeypatch.setattr(gradients, "_ALWAYS", 1)
    assert gradients._affordable([large]) == [large]  # one of them at least


def test_gradients_in_half_precision_are_the_same_within_what_it_rounds():
    want, found = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.125])
    assert gradients._same(want.bfloat16(), found.bfloat16(), 1.0)
    assert not gradients._same(want, found, 1.0)
