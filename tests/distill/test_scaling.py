"""What the formulas of docs/scaling.md say is what a small run holds and sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thesean
from tests import models
from thesean.distill import scaling
from thesean.journal import Journal


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
