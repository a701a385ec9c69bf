"""What is probed on inputs made of the example's, and what a guide that gives no numbers on them is told.

B batch, D width
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.models import vectors
from thesean.errors import DataError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.probe import recorded_probe


class Root(nn.Module):
    """x_BD, kept_B -> y_BD: not a number but for large x."""

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return (x - 1000).log().exp() * kept.unsqueeze(1)


class Endless(nn.Module):
    """x_BD -> y_BD"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=1) * 1e30 * 1e30


def test_a_guide_that_gives_no_number_is_told_where_and_for_what():
    guide = capture(Root(), {"x": vectors(3, 4) + 2000, "kept": torch.ones(3, dtype=torch.bool)})
    values, masks = recorded_probe(guide, lambda values: ())
    assert masks == ()
    assert values[guide.graph_module.graph.output_node()].isfinite().all()
    guide = capture(Root(), {"x": vectors(3, 4) + 1002, "kept": torch.ones(3, dtype=torch.bool)})
    spec = guide.signature.inputs[0]
    object.__setattr__(spec, "example", vectors(3, 4))
    with pytest.raises(DataError) as told:
        recorded_probe(guide, lambda values: ())
    shown = r"\(x \(\d+, 4\) from -\d\.?\d* to \d\.?\d*, kept \(\d+,\) from 0 to 1\)"
    assert re.search(rf"not finite from log \(aten\.log\.default\) on when .*{shown}", str(told.value))


def test_a_guide_that_is_infinite_everywhere_is_told():
    guide = capture(Endless(), vectors(3, 4))
    with pytest.raises(
        DataError, match=r"^the guide's outputs are not finite when it is probed .* \(x \(\d+, 4\) from "
    ):
        recorded_probe(guide, lambda values: ())
