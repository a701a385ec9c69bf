"""The precision that kernels compute in: float32 at least, whatever the inputs or autocast say.

N examples, P width
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch

HALF = (torch.float16, torch.bfloat16)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision in float32, all else as it is. Differentiable."""
    return x.float() if x.dtype in HALF else x


def widen(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in one dtype: float32 for half precision, float64 where any is double. Differentiable."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return tuple(t.to(dtype) for t in tensors)


def accumulator(device: torch.device) -> torch.dtype:
    """The dtype of long sums: float64, except on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def centred(x_NP: torch.Tensor) -> torch.Tensor:
    """x_NP minus the mean of its rows. Differentiable. Exact for a constant column, which vanishes."""
    # Not centring the features, but their Gram, loses all digits at an offset of 300. The mean in float64 leaves no
    # rounding noise of a constant column to compare. What float32 rounds off that mean is taken away too: at that
    # offset the gradient gains a factor of 25.
    mean_P = x_NP.mean(0, dtype=accumulator(x_NP.device))
    rounded_P = mean_P.to(x_NP.dtype)
    return (x_NP - rounded_P).sub_((mean_P - rounded_P).to(x_NP.dtype))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off. It would turn matrix products into bf16, and a state carried over thousands of steps with them."""
    # Entered only where autocast is on: torch.export writes the context into the graph as a submodule. Shapes alone
    # have no precision, and torch no autocast for them.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
