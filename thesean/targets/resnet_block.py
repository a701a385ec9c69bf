"""The basic residual block, for convolutional networks with fewer or cheaper blocks.

B batch, C channels, H height, W width, E hidden channels
"""

from __future__ import annotations

from typing import Unpack

from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.feature_map import ConvolvedMap, MapFrame, MapNorm, check_feature_map, map_frame


class ResNetBlock(ConvolvedMap):
    """y = relu(conv3x3(relu(norm(conv3x3(x)))) + shortcut(x)) (He et al. 2015, figure 2). x_BCHW -> y_BCHW.

    The second convolution is `last`, on 3 x 3 patches; the first one has the stride.
    """

    family = "resnet-block"
    window = 3
    convolution = "first"

    def __init__(self, *, hidden_norm: MapNorm = "batch", **frame: Unpack[MapFrame]) -> None:
        super().__init__(kernel=3, hidden_norm=hidden_norm, depthwise=False, **frame)


class ResNetBlockOptions(Options):
    """Width rule: as many hidden channels E as make no more weights than the part has, 18 C E of them where C channels
    go in and out; in multiples of 8, at least 8 and at most the smaller of the part's own channel counts.

    So a basic block gets the guide's width, and a part of several blocks a block that has about as many weights as all
    of them: fewer layers, not fewer parameters, unless `width` says so. In place of bottlenecks (He et al. 2015, figure
    5, right), which have 17/16 C^2 weights where a basic block of their inner width C/4 has 72/16 C^2, choose target
    "bottleneck": a ResNet-50 in 8 parts has 27.9 M parameters with this one, of 25.6 M, and 16.0 M with that one.

    `residual` adds a shortcut, by default wherever no stream outside of the part does; `final_relu` rectifies the sum,
    by default where the guide's is nowhere negative. `hidden_norm` is "batch" (the best of
    benchmarks/results/convolutions.json, and folded into the convolution by onnxruntime), "group" (each image by
    itself) or "none".
    """

    width: int | None = Field(default=None, gt=0)
    residual: bool | None = None
    final_relu: bool | None = None
    hidden_norm: MapNorm = "batch"


def default_width(part: PartFacts) -> int:
    channels_in, channels_out = int(part.input_shape[1]), int(part.output_shape[1])
    most = min(channels_in, channels_out)
    affordable = part.params // (9 * (channels_in + channels_out))
    return max(min(8, most), min(most, affordable - affordable % 8))


def build(part: PartFacts, options: ResNetBlockOptions) -> ResNetBlock:
    return ResNetBlock(
        hidden_norm=options.hidden_norm,
        **map_frame(part, options.width or default_width(part), options.residual, options.final_relu),
    )


TARGET = Family(
    name="resnet-block",
    summary="basic residual block: two 3 x 3 convolutions, in place of one or several blocks of a convnet",
    options=ResNetBlockOptions,
    module=ResNetBlock,
    build=build,
    scope="part",
    check=lambda part, options: check_feature_map("resnet-block", part),
)
