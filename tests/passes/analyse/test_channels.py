"""B batch, C channels"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from tests.convnets import network
from thesean.passes.analyse.channels import find_channels
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.regions import Region
from thesean.passes.capture.capture import capture
from thesean.passes.graph.record import Recorded, record
from thesean.passes.plan.partition import partition
from thesean.targets.shared.channel_groups import ChannelFacts
from thesean.targets.shared.channels import Convolution, Pick, run_steps


def regions(name: str) -> tuple[list[Region], Recorded]:
    model, shape = network(name)
    captured = capture(model, torch.randn(2, *shape))
    flow = data_flow(captured.graph_module.graph)
    return [n.region for n in partition(flow)], record(captured.graph_module, {"x": torch.randn(3, *shape)})


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("basic", [[16], [32]]),
        ("pre-activated", [[16], [16]]),
        ("inverted", [[32], [32]]),
        ("next", [[32], [32]]),
        ("fire", [[16], [16]]),
        ("dense", [[16], [16]]),
        ("over time", [[32], [32]]),
        ("plain", [[16], [32]]),
        ("grouped", [[16], [16]]),
        ("separable", [[]] * 7),
        ("gated", [[16], [16]]),
        ("gated map", [[16], [16]]),
        ("shuffled", [[16], [16]]),
        ("mixed", [[32], [32]]),
    ],
)
def test_a_block_is_read_with_the_channels_that_are_its_own(name, groups):
    found, values = regions(name)
    facts = [find_channels(region, values)[0] for region in found]
    assert [[c.count for c in f.inner] if f else None for f in facts] == groups
    for region, f in zip(found, facts, strict=True):
        x = values[region.entry]
        y = run_steps(f.steps, f.weights, x.movedim(-1, 1) if f.channels_last else x)
        y = y.movedim(1, -1) if f.channels_last else y
        torch.testing.assert_close(y, values[region.exit], rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def read(function: Any, *shape: int, without: int = 0) -> tuple[ChannelFacts | None, str]:
    """Of a function of a map, all of it, or all but the last nodes."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.numbers = nn.Parameter(torch.rand(4))
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)
            self.kept = nn.BatchNorm1d(4)
            self.grouped = nn.GroupNorm(2, 4)
            self.kept_map = nn.BatchNorm2d(4)
            self.kept_map.running_mean.copy_(self.numbers.detach())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self, x * 1.0)

    guide = capture(Called().eval(), torch.randn(2, *(shape or (4, 6, 6))))
    graph = guide.graph_module.graph
    values = record(guide.graph_module, {"x": torch.randn(2, *(shape or (4, 6, 6)))})
    (entry,) = graph.find_nodes(op="placeholder")
    inside = [n for n in data_flow(graph).order if isinstance(n, fx.Node) and n.op == "call_function"]
    nodes = tuple(n for n in inside if "constant" not in n.meta)
    nodes = nodes[: len(nodes) - without]
    return find_channels(Region(entry=entry, exit=nodes[-1], nodes=nodes), values)


def gated(m: Any, x_BC: torch.Tensor) -> torch.Tensor:
    return F.hardsigmoid(F.linear(F.relu(x_BC), m.weight[..., 0, 0], m.numbers))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.conv2d(x, m.weight, padding="same"),
        lambda m, x: F.conv2d(F.pad(x, (0, 1, 1, 0)), m.weight[:, :, :2, :2], padding="valid"),
        lambda m, x: F.conv2d(x, m.weight, dilation=2, padding=2, stride=(2, 1)),
        lambda m, x: F.relu_(F.conv2d(x, m.weight)) / 2 - 1,
        lambda m, x: m.numbers.view(4, 1, 1) * x - m.numbers.view(1, 4, 1, 1),
        lambda m, x: x + m.numbers.permute(0).view(-1, 1, 1),
        lambda m, x: F.hardswish(x) * F.hardsigmoid(x) + F.mish(x),
        lambda m, x: F.elu(x) + F.softplus(x) + F.selu(x) + F.tanh(x),
        lambda m, x: F.relu6(x) + x.clamp(-0.5, 0.7) + x.clamp(min=0) + F.hardtanh(x),
        lambda m, x: F.prelu(x, m.numbers) + F.prelu(x, m.numbers[:1]),
        lambda m, x: F.gelu(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), approximate="tanh"),
        lambda m, x: F.max_pool2d(F.pad(x, (1, 0, 2, -1)), 2, ceil_mode=True),
        lambda m, x: F.dropout(x, 0.5, False) * F.adaptive_avg_pool2d(x, (1, 1)),
        lambda m, x: F.adaptive_avg_pool2d(x, 3),
        lambda m, x: (x.permute(0, 2, 3, 1) * m.numbers).permute(0, 3, 1, 2),
        lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
        lambda m, x: F.conv2d(x, m.weight, padding=2)[:, :, :-2, 1:-1],
        lambda m, x: F.relu(x)[:, :, 1:4, :99],
        lambda m, x: F.glu(F.conv2d(x, m.weight), 1),
        lambda m, x: F.glu(F.relu(F.conv2d(x, m.weight)).permute(0, 2, 3, 1), -1).permute(0, 3, 1, 2),
        lambda m, x: torch.mul(*F.conv2d(x, m.weight[:, :1], groups=4).chunk(2, 1)),
        lambda m, x: torch.maximum(*m.kept_map(F.conv2d(x, m.weight)).split([2, 2], 1)),
        lambda m, x: torch.max(*F.prelu(F.conv2d(x, m.weight), m.numbers).tensor_split(2, 1)),
        lambda m, x: F.conv2d(x, m.weight)[:, :1] * F.avg_pool2d(F.conv2d(x, m.weight), 1)[:, -3:],
        lambda m, x: torch.cat([x[:, 1:], F.relu(x)[:, :1]], 1),
        lambda m, x: sum((x + F.relu(x)).chunk(2, 1)),
        lambda m, x: torch.cat([x.permute(0, 2, 3, 1), x.relu().permute(0, 2, 3, 1)], -1).permute(0, 3, 1, 2),
        lambda m, x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
        lambda m, x: F.relu(x.view(-1, 4, 1, 6, 6).permute(0, 2, 1, 3, 4).reshape(-1, 4, 6, 6)),
        lambda m, x: F.conv1d(x.flatten(2), m.weight[..., 0, :1]).view(-1, 4, 6, 6),
        lambda m, x: F.conv2d(F.relu(x.reshape(-1, 4, 36)).unflatten(2, (4, 9)), m.weight),
        lambda m, x: F.pad(F.pad(x, (1, 0, 2, 1), mode="reflect"), (1, 1, 0, 1), mode="replicate"),
        lambda m, x: nn.ReflectionPad2d(2)(nn.ReplicationPad2d(1)(F.pad(x, (1, 1, 1, 1), mode="circular"))),
        lambda m, x: m.grouped(x) + F.instance_norm(x, weight=m.numbers, bias=m.numbers),
        lambda m, x: F.conv2d(x, m.weight.repeat(1, 1, 1, 1)[:, :2], groups=2),
        lambda m, x: F.conv_transpose2d(x, m.weight, m.numbers, stride=2, padding=1, output_padding=1),
        lambda m, x: F.interpolate(x, scale_factor=2) * F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda m, x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=True),
        lambda m, x: x * F.linear(x.mean((2, 3)), m.weight[..., 0, 0], m.numbers).sigmoid()[:, :, None, None],
        lambda m, x: (
            x * gated(m, F.adaptive_avg_pool2d(x, 1).view(x.shape[0], 4)).view(x.shape[0], 4, 1, 1).expand_as(x)
        ),
        lambda m, x: x * gated(m, F.adaptive_avg_pool2d(x, 1).flatten(1)).unflatten(1, (4, 1, 1)),
        lambda m, x: (
            F.relu(x) + gated(m, F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)).unsqueeze(2).unsqueeze(3)
        ),
    ],
)
def test_what_keeps_channels_apart_is_read_however_it_is_written(function):
    facts, unread = read(function)
    assert facts is not None, unread


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(
            F.gelu(F.linear(x, m.weight.flatten()[:12].view(2, 6))), m.weight.flatten()[:8].view(4, 2)
        ),
        lambda m, x: F.layer_norm(x, (6,)) + m.weight[0, :1, 0].repeat(1, 2),
        lambda m, x: torch.cat([F.glu(x, -1), x[..., :2], torch.mul(*x.chunk(2, 3))], -1),
    ],
)
def test_channels_that_come_last_are_read_there(function):
    facts, unread = read(function)
    assert facts is not None, unread
    assert facts.channels_last
    assert facts.maps[0].channels == 6


def test_vectors_may_be_laid_out_anew():
    shuffled, unread = read(lambda m, x: F.relu(x).view(-1, 2, 3).transpose(1, 2).reshape(-1, 6), 6)
    assert shuffled is not None, unread
    assert isinstance(shuffled.steps[-1], Pick)
    assert shuffled.steps[-1].places == (0, 3, 1, 4, 2, 5)


def test_a_stretch_may_end_before_a_map_is_laid_out_as_it_was():
    facts, unread = read(lambda m, x: F.relu(x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)), 6, without=2)
    assert (facts, unread) == (None, "it gives what is no map")


@pytest.mark.parametrize("rank", [1, 3])
def test_lines_and_volumes_are_maps(rank):
    convolve = F.conv1d if rank == 1 else F.conv3d

    def function(m, x):
        weight = m.weight[..., 0] if rank == 1 else m.weight.unsqueeze(-1).expand(-1, -1, -1, -1, 2)
        return F.silu(convolve(x, weight, padding=1))

    facts, unread = read(function, 4, *(6,) * rank)
    assert facts is not None, unread
    assert isinstance(facts.steps[-2], Convolution)
    assert len(facts.steps[-2].kernel) == rank


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda m, x: m.norm(x), "norms by the batch's own statistics"),
        (lambda m, x: x[:, :, ::2], "slice.Tensor is not among what can be read"),
        (lambda m, x: F.relu(x)[:, ::2], "slice.Tensor is not among what can be read"),
        (lambda m, x: torch.add(*x.chunk(2, 2)), "of places, and no channels"),
        (lambda m, x: F.glu(x, 2), "of places, and no channels"),
        (lambda m, x: x.view(-1, 2, 2, 6, 6).relu().view(-1, 4, 6, 6), "is not among what can be read"),
        (lambda m, x: x.transpose(1, 2).reshape(-1, 4, 6, 6), "lays out a map in another way"),
        (lambda m, x: x.permute(0, 2, 3, 1), "it gives channels in another place than it reads them"),
        (lambda m, x: F.interpolate(x, (9, 9)), "to a size that is given"),
        (lambda m, x: x.flatten(1), "is not among what can be read"),
        (lambda m, x: F.conv2d(x, F.relu(x)[:1]), "slice"),
        (lambda m, x: x - F.relu(x), "of two maps is not among what can be read"),
        (lambda m, x: 1 - F.relu(x), "is not among what can be read"),
        (lambda m, x: torch.cat([x, x], 2), "of places, and no channels"),
        (lambda m, x: x.transpose(2, 3), "lays out a map in another way"),
        (lambda m, x: F.pad(x, (1, 1), value=1.0), "pads with something else than zeros"),
        (lambda m, x: F.conv2d(x, m.weight) + m.numbers, "by a number for each place"),
        (lambda m, x: x.mean(1, keepdim=True), "of other dimensions than the map's"),
        (lambda m, x: F.layer_norm(x, (6, 6)), "norms places, and no channels"),
        (lambda m, x: F.linear(F.conv2d(x, m.weight), m.weight[..., 0, 0]), "reads places, and no channels"),
        (lambda m, x: F.elu(x, 0.5), "has an alpha of its own"),
        (lambda m, x: F.softplus(x, 2), "has a beta of its own"),
        (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), "divides by a number of its own"),
        (lambda m, x: torch.add(x, F.relu(x), alpha=2), "is scaled"),
    ],
)
def test_what_cannot_be_read_is_told(function, told):
    facts, unread = read(function)
    assert facts is None
    assert told in unread


def test_no_map_is_no_part_of_channels():
    facts, unread = read(lambda m, x: F.relu(x), 2, 2, 2, 2, 2)
    assert (facts, unread) == (None, "it reads no feature map")


def test_vectors_are_maps_without_places():
    def perceptron(m, x):
        x = F.relu(m.kept(F.linear(x, m.weight[..., 0, 0], m.numbers)))
        return F.layer_norm(F.linear(x, m.weight[..., 1, 1]), (4,)) * m.numbers

    facts, unread = read(perceptron, 4)
    assert facts is not None, unread
    assert [c.count for c in facts.inner] == [4]


def test_maps_that_are_laid_out_in_two_ways_are_not_added_as_one():
    facts, unread = read(lambda m, x: F.relu(x.permute(0, 2, 3, 1)) + F.relu(x), 4, 4, 4)
    assert facts is None
    assert "laid out in two ways" in unread


@pytest.mark.parametrize("function", [lambda m, x: F.relu(x) * x.max(1, keepdim=True)[0], lambda m, x: x + x.max()])
def test_a_maximum_over_places_is_none_of_two_maps(function):
    facts, unread = read(function)
    assert facts is None
    assert "max" in unread
