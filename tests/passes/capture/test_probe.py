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
from thesean.passes.capture.probe import decodes, recorded_probe


class Root(nn.Module):
    """x_BD, kept_B -> y_BD: a number for large x alone."""

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return (x - 1.9).log().exp() * kept.unsqueeze(1)


class Endless(nn.Module):
    """x_BD -> y_BD: infinite but at 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x == 2, x, torch.inf)


TWOS = torch.full((3, 4), 2.0)  # of which only the sign is known


class Shifted(nn.Module):
    """x_BTD -> y_BTD: each step is of those so many before it."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 0, self.by, 0))[:, : x.shape[1]]


@pytest.mark.parametrize(("by", "can"), [(0, True), (1, False), (-1, False)])
def test_a_token_is_decoded_by_itself_where_it_alone_moves_its_output(by, can):
    assert decodes(capture(Shifted(by), vectors(2, 6, 3))) is can


def test_what_a_guide_gives_on_the_probe_is_recorded():
    guide = capture(Root(), {"x": vectors(3, 4).abs() + 2, "kept": torch.tensor([True, True, False])})
    values, masks = recorded_probe(guide, lambda values: ())
    assert masks == ()
    assert values[guide.graph_module.graph.output_node()].isfinite().all()


def test_a_guide_that_gives_no_number_is_told_where_and_for_what():
    guide = capture(Root(), {"x": TWOS, "kept": torch.tensor([True, True, False])})
    with pytest.raises(DataError) as told:
        recorded_probe(guide, lambda values: ())
    shown = r"\(kept \(\d+,\) from 0 to 1, x \(\d+, 4\) from [01]\.\d+ to \d\.?\d*\)"
    assert re.search(rf"not finite from log \(aten\.log\.default\) on when .*{shown}", str(told.value))


def test_a_guide_that_is_infinite_everywhere_is_told():
    guide = capture(Endless(), TWOS)
    with pytest.raises(
        DataError, match=r"^the guide's outputs are not finite when it is probed .* \(x \(\d+, 4\) from "
    ):
        recorded_probe(guide, lambda values: ())
