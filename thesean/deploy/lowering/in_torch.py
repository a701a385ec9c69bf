"""Cores that `torch.export` can write once for every length.

In blocks, as the kernels go, their number is a symbol that torch tells 0, 1 and more of apart: the file would be right
for the lengths of the trace. One block as long as the chunk needs no number, and a scan has one body.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops import scan  # no public name yet

from thesean.targets.shared.core import Core


class AtOnce(nn.Module):
    """A core with one block as long as the chunk; `setting` is the kernel's word for a block's length.

    Quadratic in the chunk, so that a long text is read faster in several.
    """

    def __init__(self, core: Core, setting: str) -> None:
        super().__init__()
        self.core = core
        self.setting = setting

    def forward(self, *tensors: Any) -> Any:
        return self.core.kernel(*tensors, **{**self.core.settings, self.setting: tensors[0].shape[1]})


class Stepwise(nn.Module):
    """A core with a decay a step at a time: `step` of the state and what is read at a step, the decay last."""

    def __init__(self, step: Callable[..., tuple[Any, Any]]) -> None:
        super().__init__()
        self.step = step

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, log_decay, before = tensors
        inputs_T = tuple(x.transpose(0, 1) for x in (*inputs, log_decay.exp()))
        outs_T, (after,) = over_time(self.step, (before,), inputs_T)
        return outs_T.transpose(0, 1), after


def over_time(
    step: Callable[..., tuple[Any, Any]], state: tuple[torch.Tensor, ...], inputs_T: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`step` of a state and of each row of the inputs, time first -> all outputs, time first, and the last state."""

    def one(
        state: tuple[torch.Tensor, ...], at_t: tuple[torch.Tensor, ...]
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        out, state = step(state, at_t)
        return tuple(map(_own, state)), out.clone()

    last, outs_T = scan(one, tuple(map(_own, state)), inputs_T)
    return outs_T, last


def _own(x: torch.Tensor) -> torch.Tensor:
    # scan forbids outputs that share memory, and wants a state to stay laid out as it came
    return x.clone(memory_format=torch.contiguous_format)
