"""Layers that carry several streams a token, whose attention reads a sum of them: what fits inside is replaced.

B batch, T time, S streams, D width
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from tests.causal_guides import Attending
from tests.models import VOCABULARY, seeded, tokens

STREAMS, WIDTH = 2, 16


class Attention(Attending):
    def __init__(self) -> None:
        super().__init__("fused")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.fused(self.query(x), self.key(x), self.value(x)))


class Layer(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.dim = 0 if first else 2  # of the streams
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.read, self.write = nn.Parameter(torch.randn(STREAMS)), nn.Parameter(torch.randn(STREAMS))
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        read, write = (w.view(-1, *[1] * (3 - self.dim)) for w in (self.read, self.write))
        for block in (self.attention, lambda x: self.down(torch.relu(self.up(x)))):
            streams = streams + write * block(self.norm((read * streams).sum(self.dim))).unsqueeze(self.dim)
        return streams


class Streams(nn.Module):
    """ids_BT -> logits_BTV; streams stand before the batch, as Gemma 3n has them, or before the width."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.dim = 0 if first else 2
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(Layer(first) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        streams = torch.stack([self.words(ids)] * STREAMS, self.dim)
        for layer in self.layers:
            streams = layer(streams)
        return self.head(streams.mean(self.dim))


@pytest.mark.parametrize(
    ("first", "why"), [(True, "one example of a batch changes"), (False, "a sequence (batch, time, width) in and out")]
)
def test_the_attention_of_each_layer_is_replaced(first, why):
    plan = thesean.plan(seeded(Streams, first), "rnn", example_inputs=tokens(3, 9))
    assert [part.path for part in plan.replaced] == ["layers.0.attention", "layers.1.attention"]
    (note,) = [n for n in plan.notes if "what fits inside is replaced" in n]
    assert why in note
