"""A sequence in blocks."""

from __future__ import annotations

import torch


def blocks(x: torch.Tensor, size: int, dim: int) -> tuple[torch.Tensor, ...]:
    """`size` steps at a time along `dim`. A size that a trace has as a symbol is the whole length: how many blocks that
    are must not be asked there.
    """
    return x.split(size, dim) if isinstance(size, int) else (x,)
