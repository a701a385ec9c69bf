"""h_t = decay_t * h_{t-1} + input_t, elementwise: the core of gated linear recurrences such as minGRU.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from thesean.kernels.shared.dispatch import Backend, choose, load
from thesean.kernels.shared.precision import widen


class _LinearRecurrence(torch.autograd.Function):
    """The backward is the same recurrence from the end: g_t = grad_t + decay_{t+1} * g_{t+1}."""

    @staticmethod
    def forward(
        ctx: Any, decay_BTD: torch.Tensor, input_BTD: torch.Tensor, state_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # unbind once: slicing [:, t] in the loop is two orders of magnitude slower
        hidden_BD, steps = state_BD, []
        for decay_BD, input_BD in zip(decay_BTD.unbind(1), input_BTD.unbind(1), strict=True):
            hidden_BD = torch.addcmul(input_BD, decay_BD, hidden_BD)
            steps.append(hidden_BD)
        hidden_BTD = torch.stack(steps, dim=1)
        ctx.save_for_backward(decay_BTD, hidden_BTD, state_BD)
        return hidden_BTD, hidden_BD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_BTD: torch.Tensor, grad_last_BD: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        decay_BTD, hidden_BTD, state_BD = ctx.saved_tensors
        flow_BD, flows = grad_last_BD, []
        for decay_BD, grad_BD in zip(reversed(decay_BTD.unbind(1)), reversed(grad_BTD.unbind(1)), strict=True):
            total_BD = grad_BD + flow_BD
            flows.append(total_BD)
            flow_BD = decay_BD * total_BD
        total_BTD = torch.stack(flows[::-1], dim=1)
        grad_decay_BTD = None
        if ctx.needs_input_grad[0]:
            before_BTD = torch.cat([state_BD.unsqueeze(1), hidden_BTD[:, :-1]], dim=1)
            grad_decay_BTD = total_BTD * before_BTD
        return grad_decay_BTD, total_BTD, flow_BD


def linear_recurrence(
    decay_BTD: torch.Tensor, input_BTD: torch.Tensor, state_BD: torch.Tensor, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """All hidden states of h_t = decay_t * h_{t-1} + input_t from h_0 = state, and the last one.

    decay_BTD, input_BTD, state_BD -> hidden_BTD, last_BD. T steps at once equal T single steps. Half-precision inputs
    are computed in float32: `hidden_BTD` has the input's dtype, `last_BD` stays wide, to be carried on. Differentiable
    once. Raises ValueError for shapes that do not fit or T = 0.
    """
    batch, time, width = input_BTD.shape
    if decay_BTD.shape != input_BTD.shape or state_BD.shape != (batch, width) or time == 0:
        raise ValueError(
            f"linear_recurrence: expected decay and input (B, T, D) with T >= 1 and state (B, D), found decay "
            f"{tuple(decay_BTD.shape)}, input {tuple(input_BTD.shape)}, state {tuple(state_BD.shape)}."
        )
    if choose(backend, "linear_recurrence", input_BTD.device) == "triton":
        hidden_BTD, last_BD = load("linear_recurrence")(decay_BTD, input_BTD, state_BD)
    else:
        hidden_BTD, last_BD = _LinearRecurrence.apply(*widen(decay_BTD, input_BTD, state_BD))
    return hidden_BTD.to(input_BTD.dtype), last_BD
