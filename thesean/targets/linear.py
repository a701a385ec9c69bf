"""One affine map: the cheapest part that still does something, solved in closed form.

B batch, T time, D width, C channels, H height, W width of a feature map
"""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack

import torch
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.feature_map import Windows, check_feature_map
from thesean.targets.shared.module import State
from thesean.targets.shared.sequence import SmallLinear, check_sequence, describe
from thesean.targets.shared.shaped import ShapedFrame, ShapedTarget

# What one map is applied to: each token of a sequence, each pixel of a feature map, or the whole flattened part
Unit = Literal["token", "pixel", "whole"]


class Linear(ShapedTarget):
    """y = last(x) + x, per token, per pixel (x averaged to the output's resolution) or for the part as one vector.

    The sum is left out for a branch, which has a stream beside it, and where shapes differ.
    """

    family = "linear"

    def __init__(self, *, unit: Unit, **frame: Unpack[ShapedFrame]) -> None:
        super().__init__(**frame)
        self.unit = unit
        size_in, size_out = (s[0] if unit == "pixel" else math.prod(s) for s in (self.input_shape, self.output_shape))
        self.last = SmallLinear(size_in, size_out)
        self.windows = Windows(self.input_shape[1:], self.output_shape[1:], None) if unit == "pixel" else None

    def config(self) -> dict[str, Any]:
        return {**super().config(), "unit": self.unit}

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        if self.windows is not None:
            return self.windows.average(x).movedim(1, -1), None
        return (x.flatten(1) if self.unit == "whole" else x), None

    def shape(self, y: torch.Tensor) -> torch.Tensor:
        if self.windows is not None:
            return y.movedim(-1, 1)
        return y.unflatten(1, self.output_shape) if self.unit == "whole" else y

    def unshape(self, y: torch.Tensor) -> torch.Tensor:
        return y.movedim(1, -1) if self.windows is not None else y

    def forward(self, x: torch.Tensor, state: State | None = None) -> Any:
        if self.windows is None:
            return super().forward(x)
        # the same map as a 1 x 1 convolution, which needs no transposed copies
        y = F.conv2d(self.windows.average(x), self.last.weight[:, :, None, None], self.last.bias)
        skip = self.skip(x)
        return y if skip is None else y + skip

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        pixels = math.prod(self.output_shape[1:]) if self.unit == "pixel" else 1
        return 2 * part.rows(sizes) * pixels * self.last.weight.numel()


class LinearOptions(Options):
    """Width rule: none, it is one matrix; on a part that is no sequence and no feature map as large as its flattened
    input times its flattened output.

    `residual` adds the input where the shapes agree; by default wherever no stream outside of the part does.
    """

    residual: bool | None = None


def unit_of(part: PartFacts) -> Unit:
    if part.is_sequence:
        return "token"
    return "pixel" if len(part.input_shape) == len(part.output_shape) == 4 else "whole"


def check(part: PartFacts, options: LinearOptions) -> None:
    unit = unit_of(part)
    if unit == "token":
        check_sequence("linear", part)
    elif unit == "pixel":
        check_feature_map("linear", part)
    elif min(len(part.input_shape), len(part.output_shape)) < 2 or any(
        isinstance(dim, str) for dim in part.input_shape[1:] + part.output_shape[1:]
    ):
        raise part.mismatch(
            "linear",
            found=f"{describe(part.input_shape)} -> {describe(part.output_shape)}",
            expected="a batch and at least one more dimension, all static after the batch",
            advice=f"Trace the guide with fixed sizes, or keep it with {part.keep}.",
        )


def build(part: PartFacts, options: LinearOptions) -> Linear:
    unit = unit_of(part)
    start = 2 if unit == "token" else 1
    module = Linear(
        input_shape=[int(dim) for dim in part.input_shape[start:]],
        output_shape=[int(dim) for dim in part.output_shape[start:]],
        unit=unit,
        residual=not part.is_branch if options.residual is None else options.residual,
    )
    if not part.is_branch and module.input_shape != module.output_shape:
        # nothing runs beside it: a small map would silence the stream
        nn.init.normal_(module.last.weight, std=module.last.in_features**-0.5)
    return module


TARGET = Family(
    name="linear",
    summary="one affine map per token, per pixel or per vector, solved in closed form",
    options=LinearOptions,
    module=Linear,
    build=build,
    scope="part",
    check=check,
)
