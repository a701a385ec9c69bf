"""1 - D-MNN on a GPU, as half the squared distance of the normalised M: see `thesean.kernels.dmnn_triton`."""

from __future__ import annotations

import torch

from thesean.kernels.dmnn_triton import agreement


def dmnn_distance(x_NP: torch.Tensor, y: torch.Tensor, *, temperature: float, prepared: bool = False) -> torch.Tensor:
    """As `thesean.kernels.dmnn.dmnn_distance`: x_NP, and y_NQ or its cosines -> float32 scalar."""
    return agreement(x_NP, y, temperature=temperature, prepared=prepared, distance=True)
