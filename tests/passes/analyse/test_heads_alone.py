"""An attention whose heads' outputs are gated or normed is replaced up to there: exactly, where a window holds all.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thesean
from tests.models import seeded, spread, token_batches, tokens
from tests.remembering_guides import GatedAttention, Remembering, gated
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan

ALL = thesean.Target("rnn", window=32, sinks=0)


@pytest.mark.parametrize("after", ["gate", "norm"])
def test_the_heads_are_read_and_what_follows_them_stays(after: str):
    guide = gated(after)
    captured = capture(guide, tokens(2, 9))
    bound_plan = make_plan(captured, ALL)
    (part,) = [p for p in bound_plan.parts if p.target is not None]
    (site,) = part.sites
    facts = site.facts.attention
    assert facts is not None
    assert facts.plain
    assert site.region.shares == (after == "gate") or set(site.region.gone) == set(site.region.nodes)
    assert any("a gate or a norm, stays the guide's" in note for note in bound_plan.plan.notes)
    hybrid = build_hybrid(bound_plan).graph_module
    paths = {name for name, _ in hybrid.named_parameters()}
    assert any(name.endswith("mixer_last_weight") or "mixer.last.weight" in name for name in paths)
    ids = tokens(3, 20, seed=1)  # less than the window holds
    torch.testing.assert_close(hybrid(ids), guide(ids), rtol=1e-4, atol=1e-4)


def test_a_projection_that_the_gate_reads_too_is_counted_once_on_either_side():
    captured = capture(gated("gate"), tokens(2, 9))
    bound_plan = make_plan(captured, ALL)
    own = set(build_hybrid(bound_plan).graph_module.parameters())
    assert bound_plan.plan.new_params == sum(p.numel() for p in own)


def test_weights_that_are_read_besides_stand_in_the_way():
    captured = capture(gated("weights"), tokens(2, 9))
    bound_plan = make_plan(captured, ALL)
    (part,) = [p for p in bound_plan.parts if p.target is not None]
    assert not any(site.region.shares for site in part.sites)
    assert all(site.facts.attention is None for site in part.sites)
    told = "its attention was not read off, so that a mingru, which copies nothing, stands for it"
    assert any(note.endswith(told) for note in bound_plan.plan.notes)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("gqa", {"kv_heads": 1}), ("sliding", {"window": 32}), ("narrow-heads", {"heads": 1}), ("mla", {"rank": 8}),
    ],
)  # fmt: skip
def test_targets_that_need_the_heads_have_them(target: str, options: dict[str, Any]):
    guide = gated("gate")
    converted = thesean.compile(
        guide, thesean.Target(target, **options), data=token_batches(3), recipe="fast", progress=False
    )
    assert len(converted.plan.replaced) == 1
    if target == "sliding":
        ids = tokens(2, 12, seed=1)
        torch.testing.assert_close(converted.module(ids), guide(ids), rtol=1e-3, atol=1e-3)


def test_what_was_converted_so_is_saved_and_read_again(tmp_path):
    guide = spread(seeded(Remembering, GatedAttention("gate"), GatedAttention("norm")))
    converted = thesean.compile(guide, ALL, data=token_batches(3), recipe="fast", progress=False)
    converted.save(tmp_path / "kept")
    ids = tokens(2, 12, seed=1)
    assert torch.equal(thesean.load(tmp_path / "kept").module(ids), converted.module(ids))
    again = thesean.compile(guide, plan=converted.plan, data=token_batches(3), recipe="fast", progress=False)
    assert torch.equal(again.module(ids), converted.module(ids))
