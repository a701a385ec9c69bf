"""The bottleneck residual block, for deep convolutional networks with fewer blocks.

B batch, C channels, H height, W width, E inner channels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from pydantic import Field
from torch import nn

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.feature_map import (
    MapFrame,
    MapNorm,
    SpatialTarget,
    Windows,
    check_feature_map,
    make_norm,
    map_frame,
    standardise,
)

# of a bottleneck's outer channels, its inner ones: He et al. 2015, table 1
_INNER = 4


class Bottleneck(SpatialTarget):
    """y = relu(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x))))))) + shortcut(x)) (He et al. 2015, figure 5, right).

    x_BCHW -> y_BCHW. The last 1 x 1 convolution is `last`; the 3 x 3 one has the stride.
    """

    family = "bottleneck"

    def __init__(self, *, hidden_norm: MapNorm = "batch", **frame: Unpack[MapFrame]) -> None:
        super().__init__(**frame)
        self.hidden_norm = hidden_norm
        channels, *size_in = self.input_shape
        self.places = Windows(size_in, self.output_shape[1:], 3)
        self.reduce = nn.Conv2d(channels, self.width, 1)
        self.spatial = nn.Conv2d(self.width, self.width, 3, self.places.stride, self.places.padding)
        for conv in (self.reduce, self.spatial):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.reduced_norm = make_norm(hidden_norm, self.width)
        self.norm = make_norm(hidden_norm, self.width)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "hidden_norm": self.hidden_norm}

    def hidden(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        reduced_BEHW = self.reduced_norm(self.reduce(x_BCHW)).relu()
        hidden_BEHW: torch.Tensor = self.norm(self.spatial(self.places.place(reduced_BEHW))).relu()
        return hidden_BEHW

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        standardise(self.reduce, [x for x, _ in examples])
        standardise(self.spatial, [self.places.place(self.reduce(x).relu()) for x, _ in examples])

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        before = self.input_shape[1] * self.input_shape[2] - self.output_shape[1] * self.output_shape[2]
        return super().flops(part, sizes) + 2 * part.rows(sizes) * before * self.reduce.weight.numel()


class BottleneckOptions(Options):
    """Width rule: E = `width`, or a quarter of the part's output channels, at least 8: a bottleneck's own inner width.

    So it has the weights of one of the bottlenecks that it replaces, however many they are. A ResNet-50 in 8 parts
    becomes a ResNet-26 (16.0 M parameters of 25.6 M, 4.7 GFLOPs of 8.2), not a ResNet-18: parts hand on as many
    channels as the guide's do, four times a ResNet-18's.

    `residual` adds a shortcut, by default wherever no stream outside of the part does; `final_relu` rectifies the sum,
    by default where the guide's is nowhere negative. `hidden_norm` is "batch", "group" (each image by itself) or
    "none".
    """

    width: int | None = Field(default=None, gt=0)
    residual: bool | None = None
    final_relu: bool | None = None
    hidden_norm: MapNorm = "batch"


def default_width(part: PartFacts) -> int:
    channels = int(part.output_shape[1])
    return max(min(8, channels), channels // _INNER)


def build(part: PartFacts, options: BottleneckOptions) -> Bottleneck:
    return Bottleneck(
        hidden_norm=options.hidden_norm,
        **map_frame(part, options.width or default_width(part), options.residual, options.final_relu),
    )


TARGET = Family(
    name="bottleneck",
    summary="bottleneck residual block: 1 x 1, 3 x 3 and 1 x 1 convolutions, in place of one or several",
    options=BottleneckOptions,
    module=Bottleneck,
    build=build,
    scope="part",
    check=lambda part, options: check_feature_map("bottleneck", part),
)
