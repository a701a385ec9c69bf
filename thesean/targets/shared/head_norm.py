"""Queries and keys that are normalised head by head before they meet (Henry et al. 2020), as numbers and as a module.

C width of a head
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import nn


class Meeting(TypedDict, total=False):
    """What queries and keys go through before they meet, as constructors take it: the eps of both norms, and the pairs
    that are turned (feature, feature, radians a step).
    """

    norm_eps: list[float] | None
    rotation: list[list[float]] | None


class HeadNorm(NamedTuple):
    """x / sqrt(mean x^2 + eps) * weight over a head's features."""

    weight_C: torch.Tensor
    eps: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight_C, self.eps)


class RmsNorm(nn.Module):
    """`HeadNorm` with a weight to train, ones until it is copied."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = float(eps)
        self.weight_C = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight_C, self.eps)


def head_norms(width: int, eps: list[float] | None) -> nn.ModuleList:
    """Of query and key; none where no eps are given."""
    return nn.ModuleList(RmsNorm(width, e) for e in eps or ())


@torch.no_grad()
def copy_norms(modules: nn.ModuleList, norms: tuple[HeadNorm, HeadNorm] | None) -> None:
    for module, norm in zip(modules, norms or (), strict=True):
        assert isinstance(module, RmsNorm)
        module.weight_C.copy_(norm.weight_C)


def rms_norm(x: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight_C.to(wide.dtype)).to(x.dtype)
