"""Depthwise separable convolutions for feature maps.

B batch, C channels, H height, W width, E hidden channels
"""

from __future__ import annotations

from typing import Any, Unpack

from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.feature_map import ConvolvedMap, MapFrame, MapNorm, check_feature_map, map_frame


class Conv2d(ConvolvedMap):
    """y = pointwise(relu(depthwise(x))) (Howard et al. 2017, section 3.1), with a shortcut. x_BCHW -> y_BCHW.

    The depthwise convolution has the stride and E = expand C channels; the pointwise one is `last`.
    """

    family = "conv-2d"
    convolution = "depthwise"

    def __init__(self, *, kernel: int, hidden_norm: MapNorm = "batch", **frame: Unpack[MapFrame]) -> None:
        super().__init__(kernel=kernel, hidden_norm=hidden_norm, depthwise=True, **frame)
        self.kernel = kernel

    def config(self) -> dict[str, Any]:
        return {**super().config(), "kernel": self.kernel}


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
        kernel=options.kernel,
        hidden_norm=options.hidden_norm,
        **map_frame(part, options.expand * int(part.input_shape[1]), options.residual, options.final_relu),
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
