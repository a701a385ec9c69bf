"""What probes read of the guide, and what hybrids give from their part on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests import hand_written, models
from tests.kept_captures import capture
from tests.models import token_batches, vectors
from thesean.choose.activations import Activations
from thesean.choose.candidates import find_candidates
from thesean.passes.graph import walk as walking
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.shelf import Shelf
from thesean.passes.plan.divide import divide
from thesean.passes.plan.hybrid import build_hybrid

GUIDES: dict[str, Any] = {
    "gpt": (lambda: models.gpt2(2), lambda: token_batches(2), ["identity", "gru", "narrow"], "sublayer"),
    "blocks": (lambda: models.gpt2(2), lambda: token_batches(2), ["identity", "gru"], "block"),
    "images": (models.resnet, lambda: [models.labelled(2, 4, 1, 8, 8)[0][0]], ["identity", "mlp"], "block"),
    "shared": (
        lambda: hand_written.Looped().eval(), lambda: [vectors(3, 12, 16), vectors(2, 5, 16)], ["identity"], "sublayer",
    ),
}  # fmt: skip


@cache
def prepared(name: str):
    """Nobody changes them."""
    guide, data, names, granularity = GUIDES[name]
    batches = data()
    found = capture(guide(), batches[0])
    candidates = find_candidates(divide(found, granularity=granularity), names)
    (spec, *_) = found.signature.inputs
    return candidates, [batch if isinstance(batch, dict) else {spec.name: batch} for batch in batches]


@pytest.mark.parametrize("bound", [2**30, 0], ids=["in memory", "mapped from disk"])
@pytest.mark.parametrize("name", ["gpt", *(pytest.param(n, marks=pytest.mark.thorough) for n in GUIDES if n != "gpt")])
def test_from_its_part_on_a_hybrid_gives_what_all_of_it_gives(name, bound):
    candidates, inputs = prepared(name)
    with Shelf(bound) as shelf, torch.no_grad():
        activations = Activations(candidates, inputs, inputs, shelf)
        for p, row in enumerate(candidates.options):
            for c in (c for c, option in enumerate(row) if option is not None and option.target is not None):
                hybrid = build_hybrid(candidates.alone(p, c), share=True).graph_module.eval()
                tail = activations.tail(p, hybrid)
                for number, given in enumerate(inputs):
                    pairs = zip(*map(pytree.tree_leaves, (tail.output(number), hybrid(**given))), strict=True)
                    assert all(torch.equal(y, wanted) for y, wanted in pairs)


def test_the_guide_runs_once_whatever_the_number_of_candidates(monkeypatch: pytest.MonkeyPatch):
    candidates, inputs = prepared("gpt")
    guide, ran = candidates.binder.captured.graph_module, []
    before = walking.value_of

    def counted(graph_module, node, env, given):
        ran.append(node.name)
        return before(graph_module, node, env, given)

    monkeypatch.setattr(walking, "value_of", counted)  # that of the walks alone: tails have it by name
    activations = Activations(candidates, inputs[:1], [])
    for p, row in enumerate(candidates.options):
        for c in (c for c, option in enumerate(row) if option is not None and option.target is not None):
            hybrid = build_hybrid(candidates.alone(p, c), share=True)
            for replacement in hybrid.replacements:
                pairs = activations.examples(p, replacement)
                assert [tuple(x.shape) for x, _ in pairs] == [(4, 10, 16)]
    assert len(ran) == len(set(ran)) <= len(guide.graph.nodes)


def test_examples_are_the_guides_own_activations():
    candidates, inputs = prepared("gpt")
    guide = candidates.binder.captured.graph_module
    hybrid = build_hybrid(candidates.alone(2, 1), share=True)
    (replacement,) = hybrid.replacements
    ((x_BTD, y_BTD), _) = Activations(candidates, inputs, []).examples(2, replacement)
    ends = [replacement.guide_entry, replacement.guide_exit]
    seen = intermediates(guide, ends, with_output=False)(**inputs[0])
    assert torch.equal(x_BTD, seen[replacement.guide_entry])
    assert torch.equal(y_BTD, seen[replacement.guide_exit])
