"""Batch norms in training that see the rows of all ranks: see thesean/ranks.py."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from thesean import exchange, ranks


def together() -> Any:
    """A context in which batch norms in training see the rows of all ranks."""
    return nullcontext() if ranks.count() == 1 else _Norms()


class _Norms(TorchFunctionMode):
    """Batch normalisation in training by mean and variance over the rows of all ranks; of a rank that is apart from the
    others for a while, torch's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = ranks.count()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and ranks.count() == self._count:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """x (N, C, ...), as torch.nn.functional.batch_norm."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    number = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64, device=x.device)
    exchange.add_up([number])
    rows = float(number)
    mean_C = _Summed.apply(x.sum(dims)) / rows
    apart_x = x - mean_C.view(shape)
    var_C = _Summed.apply(apart_x.square().sum(dims)) / rows
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean_C.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((var_C * (rows / max(1.0, rows - 1))).to(running_var.dtype), momentum)
    y = apart_x * (var_C + eps).rsqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(input.dtype)


class _Summed(torch.autograd.Function):
    """A sum over ranks of which each makes something of its own: so do their gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return exchange.added(x, "norms")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return exchange.added(grads[0], "norms")
