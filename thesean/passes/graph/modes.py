"""Eval mode for a while: flags and buffers come back as they were."""

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
