"""D-MNN, a differentiable mutual nearest-neighbour similarity; formula, limits and gradient are with its kernel.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

from typing import Any

import torch

from thesean.kernels import dmnn as kernel
from thesean.kernels.dispatch import Backend
from thesean.similarity.base import Measure
from thesean.similarity.prepared import Prepared, preparer, side


def dmnn(
    x_NP: torch.Tensor, y: torch.Tensor | Prepared, temperature: float = 0.1, backend: Backend = "auto"
) -> torch.Tensor:
    """Mean overlap of the soft neighbourhoods. x_NP, y_NQ -> scalar in [0, 1]. Blind to rotation, scale and shift."""
    return kernel.dmnn(x_NP, **_other(y, temperature), backend=backend)


def dmnn_distance(
    x_NP: torch.Tensor, y: torch.Tensor | Prepared, temperature: float = 0.1, backend: Backend = "auto"
) -> torch.Tensor:
    """1 - D-MNN as the mean squared Hellinger distance of the neighbourhoods."""
    return kernel.dmnn_distance(x_NP, **_other(y, temperature), backend=backend)


def _other(y: torch.Tensor | Prepared, temperature: float) -> dict[str, Any]:
    if isinstance(y, torch.Tensor):
        return {"y": y, "temperature": temperature}
    logits_NN = side(y, kernel.neighbour_logits, temperature=temperature)
    return {"y": logits_NN, "temperature": temperature, "prepared": True}


MEASURE = Measure(
    name="dmnn",
    summary="overlap of soft nearest-neighbour distributions, with a temperature; our definition of D-MNN",
    value=dmnn,
    loss=dmnn_distance,
    prepare=preparer(kernel.neighbour_logits),
    min_examples=3,
    must_vary=("x", "y"),
)
