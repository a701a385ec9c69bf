"""h_t = decay_t * h_{t-1} + input_t on a GPU: one program holds a few channels and walks through time.

The loads of `STEPS` steps don't depend on the state, so they are issued together, before the dependent chain of
multiplications; what is left is sequential and exact: T steps at once equal T single steps to the bit, which a parallel
scan would not give. Programs are independent, without atomics or shared memory.

B batch, T time, D width, C channels of one program
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from thesean.kernels.shared.device_triton import device_of
from thesean.kernels.shared.launches import launch


@triton.jit(do_not_specialize=["T"])
def forward_kernel(decay, input, state, hidden, last, T, D, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """decay_BTD, input_BTD, state_BD -> hidden_BTD, last_BD. Grid: (B, ceil(D / BLOCK)), in this order: B is large."""
    wide = last.dtype.element_ty  # the accumulator: bf16 drifts past T=2048
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    row = tl.program_id(0).to(tl.int64) * D + channel
    at = tl.program_id(0).to(tl.int64) * T * D + channel
    h = tl.load(state + row, mask=inside, other=0.0).to(wide)
    zero = tl.zeros_like(channel)  # makes a vector of t: the interpreter cannot mask by a scalar
    for start in range(0, T, STEPS):
        decays = ()
        inputs = ()
        for step in tl.static_range(STEPS):
            here = inside & (zero + start + step < T)  # past the end h stays as it is
            decays = decays + (tl.load(decay + at + step * D, mask=here, other=1.0).to(wide),)
            inputs = inputs + (tl.load(input + at + step * D, mask=here, other=0.0).to(wide),)
        for step in tl.static_range(STEPS):
            h = decays[step] * h + inputs[step]
            here = inside & (zero + start + step < T)
            tl.store(hidden + at + step * D, h.to(hidden.dtype.element_ty), mask=here)
        at += STEPS * D
    tl.store(last + row, h, mask=inside)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    decay,
    hidden,
    state,
    grad_hidden,
    grad_last,
    grad_decay,
    grad_input,
    grad_state,
    T,
    D,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g_t = grad_t + decay_{t+1} * g_{t+1}, from the end; grad_input = g_t, grad_decay = g_t * h_{t-1}."""
    wide = grad_state.dtype.element_ty
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    row = tl.program_id(0).to(tl.int64) * D + channel
    base = tl.program_id(0).to(tl.int64) * T * D + channel
    first = tl.load(state + row, mask=inside, other=0.0).to(wide)
    flow = tl.load(grad_last + row, mask=inside, other=0.0).to(wide)
    for start in range(0, T, STEPS):
        end = tl.zeros_like(channel) + (T - 1 - start)  # this block's last step
        decays = ()
        grads = ()
        befores = ()
        for step in tl.static_range(STEPS):
            t = end - step
            at = base + t.to(tl.int64) * D
            here = inside & (t >= 0)
            decays = decays + (tl.load(decay + at, mask=here, other=1.0).to(wide),)
            grads = grads + (tl.load(grad_hidden + at, mask=here, other=0.0).to(wide),)
            before = tl.load(hidden + at - D, mask=inside & (t >= 1), other=0.0).to(wide)
            befores = befores + (tl.where(t == 0, first, before),)
        for step in tl.static_range(STEPS):
            t = end - step
            at = base + t.to(tl.int64) * D
            here = inside & (t >= 0)
            total = grads[step] + flow
            tl.store(grad_input + at, total.to(grad_input.dtype.element_ty), mask=here)
            tl.store(grad_decay + at, (total * befores[step]).to(grad_decay.dtype.element_ty), mask=here)
            flow = decays[step] * total
    tl.store(grad_state + row, flow, mask=inside)


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, decay_BTD: torch.Tensor, input_BTD: torch.Tensor, state_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, time, width = input_BTD.shape
        hidden_BTD, last_BD = torch.empty_like(input_BTD), torch.empty_like(state_BD)
        entry = launch("linear_recurrence", input_BTD.device, input_BTD.dtype)
        with device_of(input_BTD):
            forward_kernel[(batch, triton.cdiv(width, entry.block))](
                *(decay_BTD, input_BTD, state_BD, hidden_BTD, last_BD, time, width),
                STEPS=entry.depth,
                BLOCK=entry.block,
                **entry.options,
            )
        ctx.save_for_backward(decay_BTD, hidden_BTD, state_BD)
        return hidden_BTD, last_BD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_BTD: torch.Tensor, grad_last_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        decay_BTD, hidden_BTD, state_BD = ctx.saved_tensors
        batch, time, width = hidden_BTD.shape
        grad_decay_BTD, grad_input_BTD = torch.empty_like(decay_BTD), torch.empty_like(hidden_BTD)
        grad_state_BD = torch.empty_like(state_BD)
        entry = launch("linear_recurrence", hidden_BTD.device, hidden_BTD.dtype)
        with device_of(hidden_BTD):
            backward_kernel[(batch, triton.cdiv(width, entry.block))](
                *(decay_BTD, hidden_BTD, state_BD, grad_BTD.contiguous(), grad_last_BD.contiguous()),
                *(grad_decay_BTD, grad_input_BTD, grad_state_BD, time, width),
                STEPS=entry.depth,
                BLOCK=entry.block,
                **entry.options,
            )
        return grad_decay_BTD, grad_input_BTD, grad_state_BD


def linear_recurrence(
    decay_BTD: torch.Tensor, input_BTD: torch.Tensor, state_BD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `thesean.kernels.linear_recurrence`: decay_BTD, input_BTD, state_BD -> hidden_BTD, last_BD.

    hidden_BTD has the input's dtype and is what the backward reads: half-precision tensors cross the memory once, as
    they are. last_BD is float32, or float64 where an input is.
    """
    wide = torch.promote_types(torch.promote_types(decay_BTD.dtype, input_BTD.dtype), state_BD.dtype)
    wide = torch.promote_types(wide, torch.float32)
    if wide == torch.float64:
        decay_BTD, input_BTD = decay_BTD.double(), input_BTD.double()
    hidden_BTD, last_BD = _LinearRecurrence.apply(
        decay_BTD.contiguous(), input_BTD.contiguous(), state_BD.to(wide).contiguous()
    )
    return hidden_BTD, last_BD
