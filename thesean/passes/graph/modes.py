"""Another mode for a while, and then all as it was: eval flags and buffers, the random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own flag, and buffers as they were where a forward writes to them."""
    flags = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from this seed inside; afterwards the caller's go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
