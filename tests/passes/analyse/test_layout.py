"""Which dimension is time, by what reads it.

B batch, C channels, T time, D width
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import captured
from tests.models import vectors
from thesean.errors import TargetMismatchError
from thesean.passes.analyse.layout import is_channels_first
from thesean.passes.analyse.regions import module_regions
from thesean.passes.capture.capture import capture
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target

Step = Callable[["Step1d", torch.Tensor], torch.Tensor]


class Step1d(nn.Module):
    """One block: `compute` with a convolution, a linear map over 12 and one over 9 at hand."""

    def __init__(self, compute: Step) -> None:
        super().__init__()
        self.conv, self.over_12, self.over_9 = nn.Conv1d(12, 12, 3), nn.Linear(12, 12), nn.Linear(9, 9)
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


class Blocks(nn.Module):
    def __init__(self, *steps: Step, head: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Step1d(step) for step in steps)
        self.head = nn.Conv1d(12, 4, 1) if head else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x if self.head is None else self.head(x)


def blocks(*steps: Step, head: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Blocks(*steps, head=head).eval()


def layouts(*steps: Step, shape: tuple[int, ...] = (3, 12, 9), head: bool = False) -> set[bool]:
    guide = capture(blocks(*steps, head=head), vectors(*shape))
    values = captured.recorded(guide)
    regions = module_regions(captured.flow_of(guide))
    return {is_channels_first(regions[f"blocks.{k}"], values) for k in range(len(steps))}


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x: m.conv(torch.cat([x.new_zeros(x.shape[0], 12, 2), x], 2)),
        lambda m, x: m.conv(F.pad(x, (2, 0))),
        lambda m, x: m.conv(F.pad(x, (2, 0), mode="replicate")),
        lambda m, x: m.conv(torch.cat([x[:, :, :1].expand(-1, -1, 2), x], -1)),
        lambda m, x: F.pad(m.conv(x.transpose(1, 2).transpose(2, 1)), (1, 1)),
        lambda m, x: torch.cat([x[:, :, :2], m.conv(x)], 2),
    ],
)
def test_what_a_convolution_reads_is_channels_first_however_it_is_padded(step):
    assert layouts(step, step) == {True}


def test_a_step_without_a_convolution_has_the_layout_of_its_stream():
    def mlp(m: Step1d, x: torch.Tensor) -> torch.Tensor:
        return m.over_12(x.transpose(1, 2)).relu().transpose(1, 2)

    assert layouts(mlp, mlp, head=True) == {True}
    assert layouts(mlp, mlp) == {False}  # as the mixer of tokens that it may as well be


def test_a_sequence_that_is_turned_round_for_its_convolution_is_none():
    def turned(m: Step1d, x: torch.Tensor) -> torch.Tensor:
        return m.conv(F.pad(x.transpose(1, 2), (2, 0))).permute(0, 2, 1)

    assert layouts(turned, turned, shape=(3, 9, 12)) == {False}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda m, x: m.over_12(x.transpose(1, 2)).transpose(1, 2).cumsum(2), True),
        (lambda m, x: F.pad((x * m.over_12.bias[:, None]).diff(dim=2), (1, 0)), True),
        (lambda m, x: m.over_9(x).cumsum(1), False),
        (lambda m, x: m.over_9(x), False),
        (lambda m, x: F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0)) + m.over_9(x), False),
    ],
)
def test_where_no_operator_tells_the_dimension_that_runs_in_order_is_time(step, expected):
    assert layouts(step, step) == {expected}


def test_a_recurrence_is_not_put_over_channels():
    guide = capture(blocks(lambda m, x: m.conv(torch.cat([x[..., :2], x], 2))), vectors(3, 12, 9))
    with pytest.raises(TargetMismatchError, match="channels first"):
        make_plan(guide, Target("gru"), parts=["blocks.0"])
