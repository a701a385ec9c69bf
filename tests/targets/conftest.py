"""Parts as the passes would describe them.

B batch, T time, D width, H heads, C width of a head
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from thesean.targets import Affine, AttentionFacts, PartFacts


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def sequence_part() -> Callable[..., PartFacts]:
    def make(mixing="causal", width_in=16, width_out=None, time="time", attention=None) -> PartFacts:
        return PartFacts(
            path="layers.0",
            input_shape=("batch", time, width_in),
            output_shape=("batch", time, width_in if width_out is None else width_out),
            mixing=mixing,
            params=1000,
            attention=attention,
        )

    return make


@pytest.fixture
def attention_facts() -> Callable[..., AttentionFacts]:
    def make(width=16, heads=4, head_width=4, scale=0.5) -> AttentionFacts:
        def affine(out: int, into: int) -> Affine:
            return Affine(torch.randn(out, into) * into**-0.5, torch.randn(out) * 0.1)

        inner = heads * head_width
        return AttentionFacts(
            heads=heads,
            scale=scale,
            query=affine(inner, width),
            key=affine(inner, width),
            value=affine(inner, width),
            output=affine(width, inner),
        )

    return make
