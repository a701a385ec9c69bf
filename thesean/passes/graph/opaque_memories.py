"""Recurrences whose state is a matrix a head stay one operator in a graph: what computes them in chunks is a loop over
time, and hundreds of operators.

B batch, T time, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from thesean.kernels.delta_rule import delta_rule
from thesean.kernels.diagonal_scan import diagonal_scan
from thesean.kernels.linear_attention import linear_attention


class Memory(NamedTuple):
    """The kernel that an operator is, from a state of zeros: its tensors in, without the state, its output out."""

    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    reads: tuple[str, ...]
    work: int  # multiply-adds of a step for each number of the state


_ATTENDS = ("query", "key", "value")
_NAMED = {
    # the decay of a head is one number, or one for each of a key's features
    "gated_delta_rule": Memory(delta_rule, (*_ATTENDS, "beta", "log_decay"), 3),
    # one number
    "state_space": Memory(linear_attention, (*_ATTENDS, "log_decay"), 2),
    # one for each feature
    "selective_scan": Memory(diagonal_scan, (*_ATTENDS, "log_decay"), 3),
}


# Steps in a chunk, where it isn't the kernel's own choice.
_CHUNK: ContextVar[int | None] = ContextVar("chunk", default=None)


@contextmanager
def in_another_order() -> Iterator[None]:
    """Inside, sums are of a few steps at a time: what that changes is rounding."""
    token = _CHUNK.set(3)
    try:
        yield
    finally:
        _CHUNK.reset(token)


def state_of(key_BTHF: torch.Tensor, value_BTHK: torch.Tensor) -> torch.Tensor:
    """Zeros, (B, H, F, K)."""
    return value_BTHK.new_zeros(value_BTHK.shape[0], value_BTHK.shape[2], key_BTHF.shape[3], value_BTHK.shape[3])


def _registered(name: str, memory: Memory) -> Any:
    def whole(*given: torch.Tensor) -> torch.Tensor:
        query, key, value, *_ = given
        if {x.ndim for x in (query, key, value)} != {4}:
            found = ", ".join(str(x.ndim) for x in (query, key, value))
            raise ValueError(f"{name}: expected query, key and value of four dimensions, found {found}.")
        order = {} if (chunk := _CHUNK.get()) is None else {"chunk": chunk}
        return memory.kernel(*given, state_of(key, value), **order)[0]

    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The forward is run again: kept would be every chunk's matrices."""
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = whole(*inputs)
        return torch.autograd.grad(out, inputs, grad)

    schema = f"({', '.join(f'Tensor {read}' for read in memory.reads)}) -> Tensor"
    operator = torch.library.custom_op(f"thesean::{name}", whole, mutates_args=(), schema=schema)
    operator.register_fake(lambda *given: torch.empty_like(given[2], memory_format=torch.contiguous_format))
    operator.register_autograd(backward, setup_context=keep)
    packet = getattr(torch.ops.thesean, name)
    register_flop_formula(packet)(lambda query, key, value, *rates, **named: 2 * memory.work * key.numel() * value[-1])
    return packet.default


# Operators, each with what it is.
MEMORIES: dict[Any, Memory] = {_registered(name, memory): memory for name, memory in _NAMED.items()}
GATED_DELTA_RULE, STATE_SPACE, SELECTIVE_SCAN = MEMORIES
