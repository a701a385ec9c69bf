"""What compile and plan take for an equal guide is what a trace would give, and equal is nothing less than that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import models
from tests.kept_captures import KeptCaptures, described
from tests.models import tokens, vectors
from thesean.passes.capture.capture import capture
from thesean.passes.graph.text import text


@pytest.fixture
def kept() -> tuple[KeptCaptures, list[nn.Module]]:
    """And the guides that were traced."""
    traced: list[nn.Module] = []

    def counted(model, example_inputs, dynamic=None):
        traced.append(model)
        return capture(model, example_inputs, dynamic)

    return KeptCaptures(counted), traced


def test_an_equal_guide_is_not_traced_again_and_its_graph_has_its_own_weights(kept):
    captures, traced = kept
    first, second = models.resnet(), models.resnet()
    earlier, found = captures(first, vectors(3, 1, 8, 8)), captures(second, vectors(3, 1, 8, 8))
    assert traced == [first]
    assert text(found.graph_module.graph) == text(earlier.graph_module.graph)
    assert found.signature == earlier.signature
    own = {id(t) for t in (*second.parameters(), *second.buffers())}
    assert {id(t) for t in (*found.graph_module.parameters(), *found.graph_module.buffers())} <= own
    with torch.no_grad():
        second.stem.weight.mul_(3)
        x = vectors(2, 1, 8, 8, seed=1)
        torch.testing.assert_close(found.graph_module(x), second(x))
        torch.testing.assert_close(captures(models.resnet(), vectors(3, 1, 8, 8)).graph_module(x), first(x))


def test_what_differs_in_anything_is_told_apart():
    other, flagged, set_up = models.gpt2(1), models.gpt2(1), models.gpt2(1)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-6
    flagged.transformer.drop.train()
    set_up.config.use_cache = not set_up.config.use_cache
    seen = [described(guide, tokens(), None) for guide in (models.gpt2(1), other, flagged, set_up)]
    seen.append(described(models.gpt2(1), tokens(seed=1), None))
    seen.append(described(models.gpt2(1), tokens(), {"input_ids": {0: "batch"}}))
    assert None not in seen
    assert len(set(seen)) == 6
    assert described(models.gpt2(1), tokens(), None) == seen[0]


def test_another_guide_is_traced_and_so_are_other_inputs(kept):
    captures, traced = kept
    first, second = models.mlp(), models.mlp()
    with torch.no_grad():
        next(second.parameters())[0, 0] += 1e-6
    for guide in (first, second, first):
        captures(guide, vectors(3, 8))
    captures(first, vectors(3, 8, seed=1))
    assert traced == [first, second, first]


def test_what_is_no_plain_module_is_traced(kept):
    captures, traced = kept

    class Local(nn.Linear):
        """Can't be pickled, so that nobody knows what equals it."""

    for _ in range(2):
        captures(Local(4, 4).eval(), vectors(3, 4))
    assert len(traced) == 2
