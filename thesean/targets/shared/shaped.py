"""The frame of modules that are made for one shape of input and one of output."""

from __future__ import annotations

from typing import Any, Required, TypedDict

import torch

from thesean.targets.shared.module import TargetModule


class ShapedFrame(TypedDict, total=False):
    """The constructor arguments of every `ShapedTarget`, shapes without the batch: (C, H, W), or (D,) of a token."""

    input_shape: Required[list[int]]
    output_shape: Required[list[int]]
    residual: bool


class ShapedTarget(TargetModule):
    """`residual` adds the input where the shapes agree."""

    def __init__(self, *, input_shape: list[int], output_shape: list[int], residual: bool = False) -> None:
        super().__init__()
        self.input_shape, self.output_shape = tuple(input_shape), tuple(output_shape)
        self.residual = residual

    def config(self) -> dict[str, Any]:
        return {
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "residual": self.residual,
        }

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        return x if self.residual and self.input_shape == self.output_shape else None
