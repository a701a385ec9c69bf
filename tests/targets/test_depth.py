"""Twenty-four parts in a row: the first ones still learn.

B batch, T time, D width
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.targets.build import build
from tests.targets.spatial_parts import map_part
from thesean.targets import PartFacts, TargetModule
from thesean.targets.shared.facts import Mixing

DEPTH = 24


def gradient_norms(modules: list[TargetModule], x: torch.Tensor, branch: bool) -> list[float]:
    """Of each part's parameters, at a loss that reads every output."""
    y = x
    for module in modules:
        out = module(y)
        out = out[0] if module.stateful else out
        y = y + out if branch else out
    (y * torch.randn_like(y)).mean().backward()
    return [
        torch.stack([p.grad.square().sum() for p in m.parameters() if p.grad is not None]).sum().sqrt().item()
        for m in modules
    ]


def sequence(mixing: Mixing, branch: bool) -> PartFacts:
    shape = ("batch", 12, 16)
    return PartFacts(
        path="p",
        input_shape=shape,
        output_shape=shape,
        mixing=mixing,
        params=1,
        is_branch=branch,
    )


CASES = [
    *itertools.product(["linear", "conv", "mixer"], ["causal", "bidirectional"], [False, True]),
    *itertools.product(["linear", "conv", "resnet-block"], ["map", "relu map"], [False, True]),
]


@pytest.mark.parametrize(("name", "kind", "branch"), CASES)
def test_gradients_of_the_first_part_are_within_a_factor_of_ten_of_the_last(name, kind, branch):
    if "map" in kind:
        part = map_part((8, 6, 6), nonnegative=kind == "relu map", is_branch=branch)
        x = torch.randn(8, 8, 6, 6)
    else:
        part, x = sequence(kind, branch), torch.randn(8, 12, 16)
    modules = [build(name, part, scope=None if branch else "part") for _ in range(DEPTH)]
    for module in modules:
        module.prepare(part, [(x, x)])
    norms = gradient_norms(modules, x, branch)
    assert 0.1 < norms[0] / norms[-1] < 10, norms
    assert max(norms) < 100 * min(norms), norms


def test_a_chain_of_shapes_that_change_carries_gradients_through_its_projections():
    """Widths alternate, so that no part has an input to add: the hardest chain there is."""
    for name in ("conv", "resnet-block", "linear"):
        wide, narrow = map_part((8, 6, 6), (12, 6, 6)), map_part((12, 6, 6), (8, 6, 6))
        x = torch.randn(16, 8, 6, 6)
        modules: list[TargetModule] = [build(name, part) for _ in range(DEPTH // 2) for part in (wide, narrow)]
        norms = gradient_norms(modules, x, branch=False)
        assert 0.01 < norms[0] / norms[-1] < 100, (name, norms)
