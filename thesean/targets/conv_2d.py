"""Depthwise separable convolutions for feature maps.

B batch, C channels, H height, W width, E hidden channels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.feature_map import (
    MapNorm,
    Shortcut,
    SpatialTarget,
    Windows,
    check_feature_map,
    make_norm,
    map_config,
    standardise,
)


class Conv2d(SpatialTarget):
    """y = pointwise(relu(depthwise(x))) (Howard et al. 2017, section 3.1), with a shortcut. x_BCHW -> y_BCHW.

    The depthwise convolution has the stride and E = expand C channels; the pointwise one is `last`.
    """

    family = "conv-2d"

    def __init__(
        self,
        *,
        input_shape: list[int],
        output_shape: list[int],
        width: int,
        kernel: int,
        shortcut: Shortcut = "none",
        final_relu: bool = False,
        hidden_norm: MapNorm = "batch",
    ) -> None:
        super().__init__(
            input_shape=input_shape, output_shape=output_shape, width=width, shortcut=shortcut, final_relu=final_relu
        )
        self.kernel = kernel
        channels = input_shape[0]
        self.places = Windows(input_shape[1:], output_shape[1:], kernel)
        places = self.places
        self.depthwise = nn.Conv2d(channels, width, kernel, places.stride, places.padding, groups=channels)
        nn.init.kaiming_normal_(self.depthwise.weight, nonlinearity="relu")
        assert self.depthwise.bias is not None
        nn.init.zeros_(self.depthwise.bias)
        self.hidden_norm = hidden_norm
        self.norm = make_norm(hidden_norm, width)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "kernel": self.kernel, "hidden_norm": self.hidden_norm}

    def hidden(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.norm(self.depthwise(self.places.place(x_BCHW))).relu()

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        standardise(self.depthwise, [self.places.place(x) for x, _ in examples])


class Conv2dOptions(Options):
    """Width rule: E = `expand` times the part's input channels, for a depthwise convolution can't mix any two of them.

    `residual` adds a shortcut, by default wherever no stream outside of the part does; `final_relu` rectifies the sum,
    by default where the guide's is nowhere negative. `hidden_norm` is "batch", "group" (each image by itself) or
    "none". Kernel, width and norm are the best of benchmarks/results/convolutions.json that cost little.
    """

    kernel: int = Field(default=5, ge=1)
    expand: int = Field(default=4, gt=0)
    residual: bool | None = None
    final_relu: bool | None = None
    hidden_norm: MapNorm = "batch"


def build(part: PartFacts, options: Conv2dOptions) -> Conv2d:
    return Conv2d(
        width=options.expand * int(part.input_shape[1]),
        kernel=options.kernel,
        hidden_norm=options.hidden_norm,
        **map_config(part, options.residual, options.final_relu),
    )


TARGET = Family(
    name="conv-2d",
    summary="depthwise separable convolution for feature maps",
    options=Conv2dOptions,
    module=Conv2d,
    build=build,
    scope="part",
    check=lambda part, options: check_feature_map("conv-2d", part),
)
