"""The Gram of centred features on a GPU, by the tiles of the lower triangle: the kernel of CKA's split form, alone.

N examples, P width, S slices of the features
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.device_triton import device_of
from thesean.kernels.shared.grams_triton import lower_slices


def centred_gram(x_NP: torch.Tensor) -> torch.Tensor:
    """As `thesean.kernels.centred_gram`: x_NP -> gram_NN in float32. Features are read in their own dtype.

    Raises ValueError for float64.
    """
    with device_of(x_NP):
        lower_NN = lower_slices(x_NP).sum(0).tril_()  # what lies above was never written
    return lower_NN.add_(lower_NN.tril(-1).mT)
