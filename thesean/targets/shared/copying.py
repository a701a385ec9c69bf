"""Take over weights of the guide where shapes agree."""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.facts import Affine, PartFacts


@torch.no_grad()
def copy_affine(linear: nn.Linear, affine: Affine) -> bool:
    """Copy where the shapes agree; tells whether they did."""
    if linear.weight.shape != affine.weight_OI.shape:
        return False
    linear.weight.copy_(affine.weight_OI)
    linear.bias.copy_(affine.bias_O)
    return True


@torch.no_grad()
def copy_value(linear: nn.Linear, part: PartFacts) -> bool:
    """Copy the guide's value projection into the first rows, as many times as it fits; tells whether it did."""
    if part.attention is None:
        return False
    weight_VD, bias_V = part.attention.value
    copies = linear.out_features // weight_VD.shape[0]
    if copies == 0 or weight_VD.shape[1] != linear.in_features:
        return False
    rows = copies * weight_VD.shape[0]
    linear.weight[:rows] = weight_VD.repeat(copies, 1)
    linear.bias[:rows] = bias_V.repeat(copies)
    return True
