"""Norms by the batch that don't need one, and weights that begin normalised by the guide's data.

E features or channels, N values of one over all examples
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from thesean import ranks

# Fewer values of a feature than this say little of its mean and variance
ENOUGH = 32


class _Trusting(_BatchNorm):
    """Batch normalisation that trusts its running statistics where a batch is too small to have any of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and input.numel() * ranks.count() < ENOUGH * self.num_features:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class BatchNorm(_Trusting, nn.BatchNorm2d):
    """Of feature maps, (B, E, H, W)."""


class VectorBatchNorm(_Trusting, nn.BatchNorm1d):
    """Of vectors, (B, E)."""


@torch.no_grad()
def standardise(layer: nn.Conv2d | nn.Linear, inputs: Sequence[torch.Tensor]) -> None:
    """Scale and shift a layer so that each of its channels, dimension 1 of what it returns, has mean 0 and variance 1
    on these inputs.

    A normalisation by data that costs nothing afterwards (Mishkin and Matas 2016; Salimans and Kingma 2016).
    """
    count, total_E, squares_E = 0, torch.zeros(()), torch.zeros(())
    for x in inputs:
        y_EN = layer(x).transpose(0, 1).flatten(1).double()
        count += y_EN.shape[1]
        total_E, squares_E = total_E + y_EN.sum(1), squares_E + y_EN.square().sum(1)
    mean_E = total_E / count
    scale_E = (squares_E / count - mean_E.square()).clamp_min(1e-8).rsqrt()
    layer.weight.mul_(scale_E.view(-1, *[1] * (layer.weight.ndim - 1)).to(layer.weight.dtype))
    assert layer.bias is not None
    layer.bias.copy_((layer.bias - mean_E) * scale_E)
