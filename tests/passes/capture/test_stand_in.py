"""B batch, T time, D width"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests import models
from tests.captured import flow_of
from tests.models import vectors
from thesean.errors import CaptureError, DataError
from thesean.passes.analyse.regions import module_regions
from thesean.passes.capture.capture import capture
from thesean.passes.graph.signature import output_wrapper


@dataclass
class Output:
    logits: torch.Tensor
    more: dict[str, Any]


class Pair(NamedTuple):
    first: torch.Tensor
    second: Output


class Returning(nn.Module):
    def __init__(self, made: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.made, self.map = made, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(self.map(x))


def test_records_that_torch_does_not_know_are_returned_as_they_were():
    guide = models.seeded(Returning, lambda y: Output(y, {"twice": 2 * y, "none": None, "list": [y.mean(1)]})).eval()
    found = capture(guide, vectors(3, 5, 4))
    x = vectors(2, 7, 4, seed=1)
    got, want = output_wrapper(found.signature)(found.graph_module(x)), guide(x)
    assert isinstance(got, Output)
    for a, b in ((got.logits, want.logits), *((got.more[k], want.more[k]) for k in ("twice", "list"))):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert got.more["none"] is None


def test_what_is_the_same_for_all_inputs_is_returned_as_it_is():
    guide = models.seeded(Returning, lambda y: Output(y, {"loss": 0, "scale": 0.5, "named": ["by", True]})).eval()
    found = capture(guide, vectors(3, 5, 4))
    got = output_wrapper(found.signature)(found.graph_module(vectors(2, 7, 4)))
    assert got.more == {"loss": 0, "scale": 0.5, "named": ["by", True]}


@pytest.mark.parametrize("made", [lambda y: UserDict(y=y), lambda y: Pair(y, Output(y, {}))])
def test_a_record_inside_of_another_is_a_dict(made):
    found = capture(models.seeded(Returning, made).eval(), vectors(3, 5, 4))
    leaf = found.graph_module(vectors(2, 5, 4))
    assert torch.is_tensor(leaf["y"] if isinstance(leaf, dict) else leaf[1]["logits"])


@pytest.mark.parametrize(
    ("made", "error", "told"),
    [
        (lambda y: None, DataError, "the guide returns None: no tensor is in it"),
        (lambda y: {}, DataError, "the guide returns a dict: no tensor is in it"),
        (lambda y: (y, torch.distributions.Normal(y, 1.0)), CaptureError, "the guide returns a Normal, and a graph"),
        (lambda y: (y, y.shape[0]), CaptureError, "a number that comes of its inputs; .* returns the tensors alone"),
    ],
)
def test_what_is_no_tensor_is_named(made, error, told):
    with pytest.raises(error, match=told):
        capture(Returning(made).eval(), vectors(3, 5, 4))


class Called(nn.Module):
    """What it has is called as a graph's own attributes are."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.graph = nn.Parameter(torch.randn(4))
        self.register_buffer("meta", torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.code:
            x = layer(x).relu() + self.graph
        return x * self.meta


def test_modules_and_weights_may_be_called_as_a_graphs_own_attributes():
    guide = models.seeded(Called).eval()
    found = capture(guide, vectors(3, 5, 4))
    x = vectors(2, 7, 4, seed=1)
    torch.testing.assert_close(found.graph_module(x), guide(x), rtol=0, atol=0)
    assert {"code.0", "code.1"} <= set(module_regions(flow_of(found)))
    assert {id(p) for p in found.graph_module.parameters()} == {id(p) for p in guide.parameters()}
