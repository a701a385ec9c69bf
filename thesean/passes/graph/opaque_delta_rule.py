"""The gated delta rule stays one operator in a graph: what computes it in chunks is a loop over time, and a triangular
system that is solved row by row.

B batch, T time, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from thesean.kernels.delta_rule import delta_rule


@torch.library.custom_op("thesean::gated_delta_rule", mutates_args=())
def _gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beta: torch.Tensor, log_decay: torch.Tensor
) -> torch.Tensor:
    """query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH -> out_BTHK, from a state of zeros: see
    thesean/kernels/delta_rule.py.
    """
    return _whole(query, key, value, beta, log_decay)


def _whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beta: torch.Tensor, log_decay: torch.Tensor
) -> torch.Tensor:
    if query.ndim != 4 or value.ndim != 4:
        raise ValueError(f"gated_delta_rule: expected four dimensions, found {query.ndim} and {value.ndim}.")
    state_BHFK = value.new_zeros(value.shape[0], value.shape[2], query.shape[3], value.shape[3])
    return delta_rule(query, key, value, beta, log_decay, state_BHFK)[0]


@_gated_delta_rule.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rates: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _keep_inputs(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The forward is run again: kept would be every chunk's matrices."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
    with torch.enable_grad():
        out = _whole(*inputs)
    return torch.autograd.grad(out, inputs, grad)


_gated_delta_rule.register_autograd(_backward, setup_context=_keep_inputs)

GATED_DELTA_RULE: Any = torch.ops.thesean.gated_delta_rule.default


@register_flop_formula(torch.ops.thesean.gated_delta_rule)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *rates: Any, **named: Any) -> int:
    """Of the recurrence: what is held at a key, what takes its place, and what a query reads."""
    return 2 * 3 * query.numel() * value[-1]
