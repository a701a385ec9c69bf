"""Activations that are computed anew lead to the same bits, and less is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.live import Kept, Live
from tests.rank_cases import CASES
from thesean.distill.recompute import Recomputed, Recomputing
from thesean.passes.graph.surgery import clone
from thesean.recipe import Recipe

GRAPHS = ["cka, joint", "batch norms", "padded", "stochastic", "mse, progressive, uneven"]


def converted(case: str, **settings: Any) -> thesean.Converted:
    model, target, given = CASES[case]()
    return thesean.compile(model, target, progress=False, **{**given, "recipe": {**given["recipe"], **settings}})


def check_same(case: str) -> list[str]:
    expected, found = converted(case), converted(case, activation_checkpointing=True)
    for name, value in expected.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value), name
    assert [c.losses for c in found.report.curves] == [c.losses for c in expected.report.curves]
    assert not any("anew" in note for note in expected.report.notes)
    return [note for note in found.report.notes if "computed anew" in note]


@pytest.mark.parametrize("case", GRAPHS)
def test_a_conversion_is_the_same_to_the_last_bit(case):
    told = check_same(case)
    assert any("regions are computed anew in their backward: a step holds" in note for note in told)


def test_parts_that_are_trained_by_themselves_are_the_same_too():
    told = check_same("cka and output, independent")
    assert any("activations of each part are computed anew" in note for note in told)


class Drawing(nn.Module):
    """Draws, and counts what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(torch.tanh(self.linear(self.norm(x_BD))), 0.5, self.training)


def test_draws_are_the_same_and_buffers_are_written_once():
    results = []
    for wanted in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(*(Drawing() for _ in range(3)))
        run = Recomputed(network, [network]) if wanted else network
        run(models.vectors(16, 8)).square().sum().backward()
        results.append(([p.grad for p in network.parameters()], list(network.buffers()), torch.rand(3)))
    for plain, anew in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, anew, strict=True))


def steps(wanted: bool) -> tuple[int, int, Recomputing]:
    """Bytes that a deep network's forward hands on, and that are alive at most in a step."""
    graph_module = clone(captured.gpt2(layers=6).graph_module)
    graph_module.requires_grad_(True)
    inputs = {"input_ids": models.tokens(8)}
    given = [*graph_module.parameters(), *graph_module.buffers(), *inputs.values()]
    recomputing = Recomputing(Recipe(activation_checkpointing=wanted))
    run = recomputing.graph(graph_module, [])
    run(**inputs)
    with Kept(given) as kept:
        output = run(**inputs)
    del output
    with Live(given) as live:
        run(**inputs)["logits"].square().mean().backward()
    return kept.bytes, live.peak, recomputing


def test_a_step_hands_on_and_holds_less():
    (all_kept, most, plain), (kept, peak, recomputing) = steps(False), steps(True)
    assert plain.told == ""
    assert "regions are computed anew" in recomputing.told
    assert kept < all_kept / 2
    assert peak < most / 1.5
