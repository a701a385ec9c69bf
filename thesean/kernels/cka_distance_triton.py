"""1 - CKA on a GPU, as half the squared distance of the normalised Grams: see `thesean.kernels.cka_triton`."""

from __future__ import annotations

import torch

from thesean.kernels.cka import CentredGram
from thesean.kernels.cka_triton import similarity


def cka_distance(x_NP: torch.Tensor, y: torch.Tensor | CentredGram, *, debiased: bool) -> torch.Tensor:
    """As `thesean.kernels.cka.cka_distance`: x_NP, and y_NQ or a prepared guide -> float32 scalar."""
    return similarity(x_NP, y, debiased=debiased, distance=True)
