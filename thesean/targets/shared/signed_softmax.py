"""phi(x) = softmax([Wx, -Wx]) per head, the feature map of Zhang et al. 2024 (Hedgehog).

B batch, T time, H heads, C width of a head, F = 2C features
"""

from __future__ import annotations

import torch


def signed_softmax(x_BTHC: torch.Tensor) -> torch.Tensor:
    """softmax([x, -x]), (B, T, H, F)."""
    return torch.cat([x_BTHC, -x_BTHC], -1).softmax(-1)


def features(x_BTHC: torch.Tensor, map_HCC: torch.Tensor) -> torch.Tensor:
    """Of what is projected already."""
    return signed_softmax((x_BTHC.transpose(1, 2) @ map_HCC.mT).transpose(1, 2))


def signed_map(map_HCC: torch.Tensor) -> torch.Tensor:
    """Both signs in one matrix a head, (H, C, F): phi(x) = softmax(x map)."""
    return torch.cat([map_HCC.mT, -map_HCC.mT], -1)
