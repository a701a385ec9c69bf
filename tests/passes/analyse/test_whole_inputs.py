"""Which input is read as a whole and which step by step, where a network takes both at one length.

B batch, T time, D width
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.models import seeded, vectors
from thesean.passes.analyse.whole_inputs import _moved, source_as_long_as_target
from thesean.passes.capture.capture import capture
from thesean.passes.graph.signature import InputSpec


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


@pytest.mark.parametrize(("dtype", "high"), [(torch.float32, None), (torch.int64, 5), (torch.int64, None)])
def test_a_last_step_is_another_one_and_one_that_there_may_be(dtype, high):
    before = torch.full((2, 3), 4).to(dtype)
    spec = InputSpec(name="x", dtype=dtype, shape=("batch", "time"), high=high)
    after = _moved(before, spec, "time")
    assert torch.equal(before, torch.full((2, 3), 4).to(dtype))
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert bool((after[:, -1] != 4).all())
    if not dtype.is_floating_point:
        assert after[:, -1].tolist() == [0 if high else 5] * 2
    else:  # by noise, which no network takes for its own sums
        assert not torch.equal(after[0, -1], after[1, -1])
