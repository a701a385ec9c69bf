"""Which input is read as a whole and which step by step, where a network takes both at one length.

B batch, T time, D width
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.models import seeded, vectors
from thesean.passes.analyse.whole_inputs import source_as_long_as_target
from thesean.passes.capture.capture import capture


class Told(nn.Module):
    """source_BTD, target_BTD -> y_BTD, or a score of each step: a running sum that is told the source's mean."""

    def __init__(self, scores: bool, looks_ahead: bool = False) -> None:
        super().__init__()
        self.scores, self.looks_ahead = scores, looks_ahead
        self.last = nn.Linear(4, 4)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        read = target.mean(1, keepdim=True).expand_as(target) if self.looks_ahead else target.cumsum(1)
        y_BTD = self.last(torch.tanh(read + source.mean(1, keepdim=True) + 0 * source))
        return y_BTD.sum(-1) if self.scores else y_BTD


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize(("looks_ahead", "found"), [(False, ("source", "target")), (True, None)])
def test_an_encoders_and_a_decoders_input_are_told_apart_by_what_moves(scores, looks_ahead, found):
    guide = capture(seeded(Told, scores, looks_ahead), {"source": vectors(2, 5, 4), "target": vectors(2, 5, 4, seed=1)})
    assert source_as_long_as_target(guide.graph_module, guide.signature) == found


class ToldByMask(Told):
    def forward(self, mask: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        weight_BT1 = mask.unsqueeze(-1) / mask.sum(1)[:, None, None]
        mean = (source * weight_BT1).sum(1, keepdim=True)
        return self.last(torch.tanh(target.cumsum(1) + mean + 0 * source))


@pytest.mark.parametrize("known", [True, False], ids=["as captured", "without the caller's values"])
def test_a_mask_is_neither(known):
    inputs = {"source": vectors(2, 5, 4), "target": vectors(2, 5, 4, seed=1), "mask": torch.ones(2, 5)}
    guide = capture(seeded(ToldByMask, False), inputs)
    signature = guide.signature
    if not known:
        signature = replace(signature, inputs=tuple(replace(s, example=None) for s in signature.inputs))
    assert source_as_long_as_target(guide.graph_module, signature) == ("source", "target")
