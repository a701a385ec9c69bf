"""1 - D-MNN on a GPU, as half the squared distance of the normalised M: see `thesean.kernels.dmnn_triton`."""

from __future__ import annotations

import torch

from thesean.kernels.dmnn_triton import agreement


def dmnn_distance(x_NP: torch.Tensor, y_NQ: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """As `thesean.kernels.dmnn.dmnn_distance`: x_NP, y_NQ -> float32 scalar."""
    return agreement(x_NP, y_NQ, temperature=temperature, distance=True)
