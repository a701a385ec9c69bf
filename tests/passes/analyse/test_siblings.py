"""C channels"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from tests import captured
from tests.models import seeded, vectors
from thesean.passes.analyse.blocks import find_blocks
from thesean.passes.analyse.chains import chains
from thesean.passes.analyse.siblings import mend, siblings
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured


class Inverted(nn.Module):
    """An inverted residual: up, depthwise, down; the sum only where neither width nor size changes."""

    def __init__(self, into: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = into * expand
        up = [nn.Conv2d(into, inner, 1), nn.BatchNorm2d(inner), nn.ReLU6()] if expand > 1 else []
        depthwise = [nn.Conv2d(inner, inner, 3, stride, 1, groups=inner), nn.BatchNorm2d(inner), nn.ReLU6()]
        self.conv = nn.Sequential(*up, *depthwise, nn.Conv2d(inner, out, 1), nn.BatchNorm2d(out))
        self.adds = stride == 1 and into == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class Inverteds(nn.Module):
    """A stem, seven blocks in two nested lists, a layer of its own, a head."""

    def __init__(self) -> None:
        super().__init__()
        last = [(6, 8, 2, 2), (8, 8, 1, 2), (8, 8, 1, 2), (8, 10, 1, 2)]
        table = [[(4, 4, 1, 1)], [(4, 6, 2, 2), (6, 6, 1, 2)], last]
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.stages = nn.Sequential(*(nn.Sequential(*(Inverted(*row) for row in stage)) for stage in table))
        self.top = nn.Sequential(nn.Conv2d(10, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.head = nn.Linear(16, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.top(self.stages(self.stem(image))).mean((2, 3)))


@cache
def inverteds() -> Captured:
    torch.manual_seed(0)
    return capture(Inverteds().eval(), vectors(2, 3, 16, 16))


def test_blocks_of_one_list_are_parts_whatever_their_widths_strides_and_sums():
    found = [b.path() for b in find_blocks(captured.flow_of(inverteds()))]
    assert found == ["stages.0.0", "stages.1.0", "stages.1.1", *(f"stages.2.{k}" for k in range(4))]


class Twice(nn.Sequential):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self):
            image = block(image)
            if number == 1:
                image = block(image)
        return image


def test_a_block_that_is_called_twice_is_two_parts():
    guide = seeded(Inverteds)
    guide.stages[2][1].adds = False  # no residual sum tells where a call ends
    guide.stages = nn.Sequential(*guide.stages[:2], Twice(*guide.stages[2]))
    found = [b.path() for b in find_blocks(captured.flow_of(capture(guide.eval(), vectors(2, 3, 16, 16))))]
    assert found == ["stages.0.0", "stages.1.0", "stages.1.1", *(f"stages.2.{k}" for k in (0, 1, 1, 2, 3))]


def test_a_list_of_layers_is_not_a_list_of_blocks():
    for guide in (captured.mlp(), captured.convnet()):
        flow = captured.flow_of(guide)
        assert siblings(flow, chains(flow)) == []


@pytest.mark.parametrize("guide", [captured.gpt2, captured.encoder, captured.resnet, captured.token_mixer])
def test_repeats_that_heed_the_modules_borders_stay_as_they_are(guide):
    flow = captured.flow_of(guide())
    blocks = find_blocks(flow)
    assert mend(flow, chains(flow), blocks) is blocks


class Pairs(nn.Module):
    """Two lists of layers; a relu follows each pair, so that linear and relu repeat across the pairs' ends."""

    def __init__(self, others: int) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
        self.others = nn.ModuleList(nn.Linear(4, 4) for _ in range(others))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.pairs, *self.others):
            x = torch.relu(layer(x))
        return self.head(x)


@pytest.mark.parametrize(("others", "won"), [(0, True), (8, False)])
def test_siblings_win_where_they_are_most_of_the_network(others, won):
    blocks = find_blocks(captured.flow_of(capture(Pairs(others).eval(), vectors(2, 4))))
    assert ([b.path() for b in blocks] == ["pairs.0", "pairs.1"]) == won
