"""What the formulas of docs/scaling.md say is what a small run holds and sends."""

from __future__ import annotations

from dataclasses import replace
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
from thesean.distill.seen import MAX_EXAMPLES
from thesean.journal import Journal
from thesean.passes.graph.cuts import find_cuts
from thesean.passes.graph.walk import HELD_BYTES
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
    converted = thesean.compile(
        model, thesean.Target("mlp", width=6, hidden_norm="layer"), data=data, recipe=recipe, progress=False
    )
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


SMALL = scaling.Sizes(
    guide=1000, parts=2, replaced=100, replacement=50, features=3, outputs=4, width=8, vocabulary=5, itemsize=4
)  # 900 weights of the hybrid, of which 100 are new
SLOW = scaling.Hardware(flops=1e3, double=1e2, near=2, within=1e4, between=1e3)


def job(**how: bool) -> scaling.Job:
    return scaling.Job(tokens=64, steps=10, batches=2, **how)


def test_memory_traffic_and_time_of_each_stage_are_worked_by_hand():
    solving, alignment, tuning = scaling.stages_of(SMALL, job(), SLOW, ranks=4)
    # 2 parts' statistics twice: 1 + 3 + 4 + 9 + 12 doubles; a ring hands on 2 * 3/4 of what is given
    assert solving == pytest.approx(
        ("closed form", 4000 + 400 + HELD_BYTES + 3 * 464, 928 * 1.5, 497152 / 4e3 + 720 / 1e2 + 928 * 1.5 / 1e3)
    )
    held = 7600 + 2 * 16 * 16 * 8 * 4 + 4 * 2048  # weights, activations of 16 tokens, all ranks' exits
    sent = 400 * 1.5 + 3 * 2048
    seconds = 64 * (6 * 100 + 2 * 1000) / 4e3  # of the hybrid the parts alone
    assert alignment == pytest.approx(("alignment", 1200 + 1200 + held, 10 * sent, 10 * (seconds + sent / 1e3)))
    sent, seconds = 3600 * 1.5 + 3 * 2048, 64 * (6 * 900 + 2 * 1000) / 4e3
    held += 4 * 16 * 5 * 4  # outputs
    assert tuning == pytest.approx(("fine-tuning", 7200 + 10800 + held, 10 * sent, 10 * (seconds + sent / 1e3)))


def test_parts_that_are_spread_are_worked_by_hand():
    """Over two ranks, a part each, of 50 weights."""
    alignment = scaling.stages_of(SMALL, job(), SLOW, ranks=2)[1]
    ends = 2 * 64 * 8 * 4  # of all tokens, half of which are the other rank's
    held = 1200 + 3 * 200 + 7600 + 2 * 16 * 32 * 8 * 4 + ends  # the best states, an optimizer's, weights, activations
    sent = ends / 2 + 200 / 20  # and the other part's weights, each twenty steps
    seconds = 32 * 2 * 1000 / 1e3 + 64 * 6 * 50 / 1e3 + sent / 1e4
    assert alignment == pytest.approx(("alignment", held, 10 * sent, 10 * seconds))
    # of three parts a rank has two
    more = scaling.stages_of(replace(SMALL, parts=3, guide=1100), job(), SLOW, ranks=2)[1]
    assert more.traffic == pytest.approx(10 * (2 * ends / 2 + 200 / 20))
    assert scaling.stages_of(SMALL, job(sharded=True), SLOW, ranks=2)[1].traffic > 10 * 3 * 2048 / 2


def test_slices_and_activations_computed_anew_are_worked_by_hand():
    tuning = scaling.stages_of(SMALL, job(recomputed=True, sharded=True), SLOW, ranks=4)[-1]
    held = 1900 + 2000 + (512 + 16 * 512) + 1280 + 4 * 2048  # slices, a region; the stream between two regions, one
    sent = 3600 * 0.75 + 3 * (2048 + 2800)
    seconds = 64 * (8 * 900 + 2 * 1000) / 4e3
    assert tuning == pytest.approx(("fine-tuning", 7200 + 10800 // 4 + held, 10 * sent, 10 * (seconds + sent / 1e3)))


def test_what_is_gathered_of_many_tokens_is_of_so_many_examples() -> None:
    """Of 3 times as many tokens as are looked at each third, rounded up; each at two exits of two parts, 8 wide."""
    assert scaling.exits_given(SMALL, tokens=100, ranks=2) == 2 * 2 * 100 * 8 * 4
    assert scaling.exits_given(SMALL, tokens=MAX_EXAMPLES, ranks=3) == 2 * 2 * (MAX_EXAMPLES // 3 + 1) * 8 * 4
    assert scaling.exits_given(SMALL, tokens=MAX_EXAMPLES + 1) == 2 * 2 * (MAX_EXAMPLES // 2 + 1) * 8 * 4


def test_a_large_guide_is_walked_through_with_a_quarter_of_its_weight_in_hand() -> None:
    wide = replace(SMALL, guide=4 * HELD_BYTES)  # of 4 bytes each
    assert scaling.stages_of(wide, job(), SLOW, ranks=4)[0].memory == 16 * HELD_BYTES + 400 + 4 * HELD_BYTES + 3 * 464


def test_a_loss_of_the_users_own_is_given_every_value() -> None:
    assert scaling.outputs_given(SMALL, tokens=16) == 16 * 5 * 4


def test_a_rank_alone_sends_nothing_and_near_ones_have_the_fast_link():
    alone = scaling.stages_of(SMALL, job(), SLOW, ranks=1)
    assert [stage.traffic for stage in alone] == [0, 0, 0]
    assert alone[1].memory == 1200 + 1200 + 7600 + 4 * 16 * 2 * 16 * 8 * 4  # no exits
    assert alone[1].seconds == pytest.approx(10 * 64 * 2600 / 1e3)
    assert [SLOW.link(n) for n in (1, 2, 3)] == [1e4, 1e4, 1e3]
