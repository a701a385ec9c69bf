"""B batch, T time"""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.models import tokens
from thesean.errors import CaptureError
from thesean.passes.capture.capture import capture

pytest.importorskip("transformers")


def guide() -> torch.nn.Module:
    """Rotary tables that are made anew past 16 steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=rope))
    return models.spread(network.eval())


def test_up_to_the_length_of_its_tables_a_guide_is_its_graph_and_is_bounded_there():
    network = guide()
    found = capture(network, tokens(2, 10))
    assert [(b.name, b.least, b.most) for b in found.signature.bounds] == [("time", 1, 16)]
    with torch.no_grad():
        for time in (16, 24, 3):  # after a longer one too
            want, got = network(tokens(2, time)).logits, found.graph_module(tokens(2, time))["logits"]
            assert torch.equal(want, got) == (time <= 16)


def test_longer_examples_are_refused_by_the_length():
    with pytest.raises(CaptureError, match=r"past 16 steps .*found example inputs of 17: .*Give .*of 16 at most"):
        capture(guide(), tokens(2, 17))
