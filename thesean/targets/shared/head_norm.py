"""Queries and keys that are normalised before they meet, head by head (Henry et al. 2020) or over all heads at once, as
numbers and as modules.

H heads, C width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import nn

# "heads": a weight and a bias for each head; "whole": these, and one root mean square over all heads
NormForm = Literal["heads", "whole"]


class Meeting(TypedDict, total=False):
    """How queries and keys meet, as constructors take it: the eps of both norms and their form, the pairs that are
    turned (feature, feature, radians a step), and how many distances the bias has tables for, behind and ahead (a
    window: behind alone).
    """

    norm_eps: list[float] | None
    norm_form: NormForm | None
    rotation: list[list[float]] | None
    bias: list[int] | None


class HeadNorm(NamedTuple):
    """x / sqrt(mean x^2 + eps) * weight + bias over a head's features, or over those of all heads where it is `whole`.

    (C,) or (H, C), for x of (..., H, C).
    """

    weight: torch.Tensor
    eps: float
    bias: torch.Tensor | None = None
    whole: bool = False

    @property
    def form(self) -> NormForm | None:
        """None for a norm of each head by itself, with one weight for all."""
        simple = self.weight.ndim == 1 and self.bias is None
        return "whole" if self.whole else None if simple else "heads"

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return _normed(x, self.weight, self.bias, self.eps, self.whole)

    def heads(self, kept_H: torch.Tensor) -> HeadNorm:
        """Of some of the heads, in this order; not for one that is `whole`, which needs them all."""
        return self.each(lambda rows_HC: rows_HC[kept_H])

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> HeadNorm:
        """With what there is a row a head of changed."""

        def changed(rows: torch.Tensor) -> torch.Tensor:
            return change(rows) if rows.ndim == 2 else rows

        return self._replace(weight=changed(self.weight), bias=None if self.bias is None else changed(self.bias))


class RmsNorm(nn.Module):
    """`HeadNorm` with a weight to train, ones until it is copied."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = float(eps)
        self.weight_C = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normed(x, self.weight_C, None, self.eps, False)

    @torch.no_grad()
    def copy_from(self, norm: HeadNorm) -> None:
        self.weight_C.copy_(norm.weight)


class HeadsNorm(nn.Module):
    """`HeadNorm` with a weight and a bias for each of `heads`, to train."""

    def __init__(self, heads: int, width: int, eps: float, whole: bool) -> None:
        super().__init__()
        self.eps, self.whole = float(eps), whole
        self.weight_HC = nn.Parameter(torch.ones(heads, width))
        self.bias_HC = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normed(x, self.weight_HC, self.bias_HC, self.eps, self.whole)

    @torch.no_grad()
    def copy_from(self, norm: HeadNorm) -> None:
        """Of a norm of as many heads, or of as many groups of them that are alike."""
        for parameter, rows in ((self.weight_HC, norm.weight), (self.bias_HC, norm.bias)):
            if rows is None:
                parameter.zero_()
            else:
                rows_HC = rows if rows.ndim == 2 else rows.expand(len(parameter), -1)
                parameter.copy_(rows_HC[:: len(rows_HC) // len(parameter)])


def head_norms(width: int, heads: tuple[int, int], eps: list[float] | None, form: NormForm | None) -> nn.ModuleList:
    """Of query and key, which have these heads; none where no eps are given."""
    if eps is None:
        return nn.ModuleList()
    if form is None:
        return nn.ModuleList(RmsNorm(width, e) for e in eps)
    return nn.ModuleList(HeadsNorm(count, width, e, form == "whole") for count, e in zip(heads, eps, strict=True))


def copy_norms(modules: nn.ModuleList, norms: tuple[HeadNorm, HeadNorm] | None) -> None:
    for module, norm in zip(modules, norms or (), strict=True):
        assert isinstance(module, (RmsNorm, HeadsNorm))
        module.copy_from(norm)


def _normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, whole: bool) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.square().mean((-2, -1) if whole else -1, keepdim=True)
    scaled = wide * torch.rsqrt(mean + eps) * weight.to(wide.dtype)
    return (scaled if bias is None else scaled + bias.to(wide.dtype)).to(x.dtype)
