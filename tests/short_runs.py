"""Conversions that take a moment: a recipe of six steps, one of none, and a small language model."""

from __future__ import annotations

from typing import Any

from torch import nn

import thesean
from tests import hand_written, models
from thesean import Recipe
from thesean.recipe import Alignment, FineTuning

SHORT = Recipe(
    name="short",
    steps=6,
    warmup=1,
    alignment=Alignment(share=0.5, check_every=2, patience=10, ceiling=0),
    fine_tuning=FineTuning(learning_rate=1e-3),
)
FAST = Recipe.named("fast")


def compile_quietly(model: nn.Module, target: Any = "rnn", **settings: Any) -> thesean.Converted:
    return thesean.compile(model, target, progress=False, **{"recipe": FAST, **settings})


def causal() -> nn.Module:
    """A small language model."""
    return models.seeded(hand_written.Tied)
