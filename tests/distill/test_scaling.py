"""What the formulas of docs/scaling.md say is what a small run holds and sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import thesean
from tests import models
from tests.live import Live
from thesean.distill import scaling
from thesean.distill.recompute import Recomputing
from thesean.journal import Journal
from thesean.passes.graph.cuts import find_cuts
from thesean.recipe import Recipe


def sizes(model: torch.nn.Module, itemsize: int = 8) -> scaling.Sizes:
    """Of an MLP whose 3 layers of 72 weights become MLPs of 6 features: 8 x 6 + 6, a norm's 12, 6 x 8 + 8."""
    return scaling.Sizes(
        guide=sum(p.numel() for p in model.parameters()),
        parts=3,
        replaced=72,
        replacement=122,
        features=6,
        outputs=8,
        width=8,
        vocabulary=5,
        itemsize=itemsize,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_optimizer_holds_what_the_formula_says(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    held: list[int] = []
    after_step = Journal.after_step

    def looking(self: Journal, step: int, *parts: Any) -> None:
        masters, optimizer = parts[:2]
        found = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
        found += [p.grad for p in masters.parameters if p.grad is not None]
        found += [master for _, master in masters._pairs]
        held.append(sum(t.nbytes for t in found))
        after_step(self, step, *parts)

    monkeypatch.setattr(Journal, "after_step", looking)
    model = models.mlp().to(dtype)
    data = [models.vectors(16, 8, seed=k).to(dtype) for k in range(4)]
    recipe = {"steps": 2, "alignment": {"schedule": "none", "share": 0}, "fine_tuning": {"learning_rate": 1e-3}}
    converted = thesean.compile(model, thesean.Target("mlp", width=6), data=data, recipe=recipe, progress=False)
    expected = sizes(model, dtype.itemsize)
    assert sum(p.numel() for p in converted.module.parameters()) == expected.hybrid
    assert held[0] == scaling.states_held(expected, expected.hybrid)


class Block(nn.Module):
    """A transformer's, pre-norm. x_BTD -> x_BTD"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


@pytest.fixture(scope="module")
def transformer() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(nn.Sequential(*(Block(64, 2) for _ in range(9))))


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_backward_keeps_what_the_formula_says(transformer: fx.GraphModule, recomputed: bool) -> None:
    x_BTD = models.vectors(4, 32, 64)
    wide = scaling.Sizes(
        guide=0, parts=9, replaced=0, replacement=0, features=64, outputs=64, width=64, vocabulary=0, itemsize=4
    )
    cuts = find_cuts(transformer, {"input": x_BTD})
    held = cuts.held if recomputed else cuts.without
    assert held == pytest.approx(scaling.activations_held(wide, tokens=4 * 32, recomputed=recomputed), rel=0.1)
    # and a step is not far above: gradients of what it is at, and the weights'
    weights = sum(p.nbytes for p in transformer.parameters())
    run = Recomputing(Recipe(activation_checkpointing=recomputed)).graph(transformer, [])
    run(input=x_BTD)
    with Live([*transformer.parameters(), x_BTD]) as live:
        run(input=x_BTD).sum().backward()
    assert held < live.peak < 1.3 * held + weights
    transformer.zero_grad()
