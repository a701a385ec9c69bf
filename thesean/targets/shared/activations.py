"""Elementwise activations by name: what a copied MLP computes between its linear layers, and what a probe looks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x): Hendrycks and Gimpel 2016, section 2."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2: So et al. 2021 (Primer), section 4.1."""
    return F.relu(x).square()


# Parametrised ones at PyTorch's defaults: elu at alpha 1, leaky_relu at slope 0.01, softplus at beta 1.
ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "squared_relu": squared_relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
