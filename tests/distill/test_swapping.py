"""BERT-of-Theseus: parts of the hybrid and parts of the guide in one network, drawn at each step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests import captured
from tests.distill.tools import drafted
from thesean.distill.recompute import Recomputing
from thesean.distill.snapshot import with_state
from thesean.distill.swapping import Swapping, frozen, probability
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.hybrid import Hybrid
from thesean.recipe import Recipe


def inputs_of(guide: Captured) -> dict[str, torch.Tensor]:
    sizes = {s: 3 if s.startswith("batch") else 7 for s in guide.signature.symbols}
    inputs = guide.signature.random_inputs(sizes, seed=5)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, 4:] = 0
    return inputs


def leaves(output: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize(
    ("guide", "target"),
    [
        (captured.mlp, "mlp"),
        (captured.gpt2, "rnn"),  # stateful: the hybrid reads one of two outputs
        (captured.bert, "rnn"),  # reads a mask, which the hybrid makes
        (captured.gpt2, {"*.0*": "gru", "*.1*": "identity"}),
        (captured.resnet, "mlp"),
        (captured.encoder, "linear-attention"),
    ],
)
def test_any_parts_give_what_a_hybrid_of_them_gives(guide, target):
    guide = guide()
    bound_plan, hybrid = drafted(guide, target)
    hybrid.graph_module.eval()
    swapping, inputs = Swapping(guide.graph_module, hybrid, Recomputing(Recipe())), inputs_of(guide)
    state = {r.name: hybrid.module(r).state_dict() for r in hybrid.replacements}
    dropped = {r.part for r in hybrid.replacements} - set(swapping.free)
    for count in range(len(swapping.free) + 1):
        for parts in itertools.combinations(swapping.free, count):
            found = swapping.output(frozenset(parts), inputs)
            built = with_state(bound_plan, {*parts, *dropped}, state)
            for own, expected in zip(leaves(found), leaves(built.graph_module(**inputs)), strict=True):
                torch.testing.assert_close(own, expected)


def test_without_parts_it_is_the_guide_bit_for_bit():
    guide = captured.gpt2()
    _, hybrid = drafted(guide, "rnn")
    inputs = inputs_of(guide)
    found = Swapping(guide.graph_module, hybrid, Recomputing(Recipe())).output(frozenset(), inputs)
    assert torch.equal(found["logits"], guide.graph_module(**inputs)["logits"])


def test_gradients_reach_the_parts_that_stand_and_nothing_else():
    guide = captured.gpt2()
    _, hybrid = drafted(guide, "rnn")
    swapping = Swapping(guide.graph_module, hybrid, Recomputing(Recipe()))
    with frozen(guide.graph_module), frozen(hybrid.graph_module):
        for p in hybrid.parameters_of(swapping.free):
            p.requires_grad_(True)
        swapping.output(frozenset([1]), inputs_of(guide))["logits"].square().mean().backward()
    moved = {name.split(".")[0] for name, p in hybrid.graph_module.named_parameters() if p.grad is not None}
    assert moved == {r.name for r in hybrid.of_part(1)}
    assert all(p.grad is None and p.requires_grad for p in guide.graph_module.parameters())


def test_the_probability_rises_in_a_line_and_stays_at_one():
    found = [probability(step, 10, 0.2, 0.8) for step in range(10)]
    assert found == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert probability(0, 1, 1.0, 0.5) == 1


def drawing(parts: int) -> Swapping:
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    assert isinstance(hybrid, Hybrid)
    swapping = Swapping(guide.graph_module, hybrid, Recomputing(Recipe()))
    swapping.free = list(range(parts))
    return swapping


def test_each_part_is_drawn_with_the_probability_and_one_at_least():
    swapping = drawing(8)
    torch.manual_seed(0)
    many = [swapping.drawn(0.25) for _ in range(4000)]
    for part in range(8):
        # each with .25, and where none is, one of eight: 0.75^8 / 8 more
        assert sum(part in parts for parts in many) / 4000 == pytest.approx(0.2625, abs=0.03)
    assert all(many)
    assert swapping.drawn(1.0) == frozenset(range(8))
    assert {len(swapping.drawn(0.0)) for _ in range(50)} == {1}


def test_draws_are_those_of_the_generator_that_checkpoints_keep():
    swapping = drawing(4)
    torch.manual_seed(3)
    swapping.drawn(0.5)
    state = torch.get_rng_state()
    first = [swapping.drawn(0.5) for _ in range(20)]
    torch.set_rng_state(state)
    assert [swapping.drawn(0.5) for _ in range(20)] == first


def test_flags_come_back_after_an_error():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    def run() -> None:
        with frozen(module):
            assert not any(p.requires_grad for p in module.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert [p.requires_grad for p in module.parameters()] == [True, False]
