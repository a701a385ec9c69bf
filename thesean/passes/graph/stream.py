"""A stream whose outputs come late: the modules that stand in its graph, its inputs, and its outputs without the delay.

B batch, T new steps, k steps of delay, X whatever a step holds
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from thesean.passes.graph.signature import InputSpec, Signature

# In a graph's meta: how many steps late its outputs come, and its signature, which has one more input.
DELAY, STREAM = "delay", "stream"

SEEN = "seen"  # that input, (B, T): True where a token comes in


class Delay(nn.Module):
    """What came k steps before, zeros before the first: x, state -> the same; x (B, T, X), state (B, k, X), or with the
    steps in another dimension `dim`.
    """

    stateful = True

    def __init__(self, steps: int, dim: int = 1) -> None:
        super().__init__()
        self.steps = steps
        self.dim = dim

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if state is None:
            state = x.new_zeros([self.steps if d == self.dim else size for d, size in enumerate(x.shape)])
        both = torch.cat([state, x], self.dim)
        before = (slice(None),) * self.dim
        return both[(*before, slice(None, -self.steps))], both[(*before, slice(-self.steps, None))]

    def extra_repr(self) -> str:
        return f"steps={self.steps}, dim={self.dim}"


class Streamed(nn.Module):
    """A module that looks ahead, as a stream from its start on: k steps late even where no state is given."""

    stateful = True

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BTD: torch.Tensor, state: Any = None, *, mask: torch.Tensor | None = None) -> Any:
        return self.module(x_BTD, self.module.initial_state(x_BTD) if state is None else state, mask=mask)


def steps_ahead(module: Any) -> int:
    """How many later steps a module that carries a state reads."""
    return int(getattr(module, "lookahead", 0)) if getattr(module, "stateful", False) else 0


def looks_ahead(graph_module: fx.GraphModule) -> bool:
    return any(steps_ahead(m) for m in graph_module.modules())


def delay_of(graph_module: fx.GraphModule) -> int:
    return int(graph_module.meta.get(DELAY, 0))


def streamed(signature: Signature, name: str) -> Signature:
    """With the input `name` that says where a token comes in."""
    batch = next((s for s in signature.symbols if s.startswith("batch")), signature.fixed_rows or 1)
    time = next(s for s in signature.symbols if not s.startswith("batch"))
    return replace(signature, inputs=(*signature.inputs, InputSpec(name=name, dtype=torch.bool, shape=(batch, time))))


def flushed(stream: Signature, inputs: dict[str, torch.Tensor], delay: int) -> dict[str, torch.Tensor]:
    """Inputs of whole sequences as a stream takes them: each one's last step again, `delay` times, as no tokens."""
    *specs, seen = stream.inputs
    made = {spec.name: inputs[spec.name] for spec in specs}
    sizes = {d: v for spec in specs for d, v in zip(spec.shape, inputs[spec.name].shape, strict=True)}
    batch, time = (sizes[d] for d in seen.shape)
    for spec in specs:
        for dim in (d for d, size in enumerate(spec.shape) if size == seen.shape[1]):
            value = inputs[spec.name]
            made[spec.name] = torch.cat([value, *[value.narrow(dim, time - 1, 1)] * delay], dim)
    step_1S = torch.arange(time + delay, device=next(iter(made.values())).device).unsqueeze(0)
    made[seen.name] = (step_1S < time).expand(batch, -1)
    return made


def in_time(late: torch.Tensor, shape: torch.Size, delay: int) -> torch.Tensor:
    """An output of a flushed stream without its first `delay` steps, where the whole sequence's has this shape."""
    dims = [d for d, (have, want) in enumerate(zip(late.shape, shape, strict=False)) if have == want + delay != want]
    return late.narrow(dims[0], delay, shape[dims[0]]) if len(dims) == 1 else late
