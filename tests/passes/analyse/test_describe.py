from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.captured import KERNELS
from thesean.passes.analyse.describe import _convolution, describe_operators
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.partition import Granularity, partition


def words(guide: Captured, granularity: Granularity = "block") -> list[str]:
    return [describe_operators(p.region) for p in partition(captured.flow_of(guide), granularity)]


@pytest.mark.parametrize("attention", KERNELS)
def test_attention_is_seen_fused_and_written_out(attention: str):
    assert words(captured.gpt2(attention=attention)) == ["attention + mlp"] * 2
    assert words(captured.bert(attention)) == ["attention + mlp"] * 2
    assert words(captured.gpt2(attention=attention), "sublayer") == ["attention", "mlp"] * 2


def test_a_gate_is_told():
    assert words(captured.llama()) == ["attention + gated mlp"] * 2


def test_an_mlp_needs_no_module():
    assert words(captured.functional()) == ["mlp"] * 3


def test_convolutions_are_counted_by_kernel():
    assert words(captured.resnet())[:3] == ["2 conv2d 3x3", "2 conv2d 3x3", "2 conv2d 3x3 + conv2d 1x1"]


def test_a_depthwise_convolution_is_named():
    layers = [nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2)]
    guide = capture(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 3)).eval(), models.vectors(3, 4, 6, 6))
    assert words(guide) == ["depthwise conv2d 5x5 + conv2d 1x1"] * 2 or words(guide) == [
        "depthwise conv2d 5x5", "conv2d 1x1",
    ] * 2  # fmt: skip


def test_other_mixing_is_named_by_its_operator():
    assert words(captured.token_mixer(), "sublayer") == ["linear + cumsum", "mlp"] * 2


def test_class_names_say_nothing():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.softmax = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.softmax(x)

    guide = capture(nn.Sequential(Attention(), Attention(), nn.Linear(8, 3)).eval(), models.vectors(3, 8))
    assert words(guide) == ["linear"] * 2


@pytest.mark.parametrize(("groups", "told"), [(1, "conv2d 3x5"), (2, "conv2d 3x5"), (4, "depthwise conv2d 3x5")])
def test_a_convolution_is_depthwise_where_each_channel_has_its_own(groups, told):
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    weight.meta["val"] = torch.ones(4, 4 // groups, 3, 5)
    places = ([1, 1], [0, 0], [1, 1])
    plain = graph.call_function(torch.ops.aten.conv2d.default, (x, weight, None, *places, groups))
    general = graph.call_function(torch.ops.aten.convolution.default, (x, weight, None, *places, False, [0, 0], groups))
    assert [_convolution(node) for node in (plain, general)] == [told] * 2
