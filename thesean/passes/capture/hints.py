"""torch's own transformers look whether a mask is the causal one, to hint at it: a branch on values, and no graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import transformer

_LOOK = "_detect_is_causal_mask"


@contextmanager
def masks_not_looked_at() -> Iterator[None]:
    """Inside, nn.TransformerEncoder and nn.TransformerDecoder apply the masks that they are given, as they would
    without the hint: the numbers are the same. What the caller says of `is_causal` holds.
    """
    original = getattr(transformer, _LOOK, None)  # not in every torch
    if original is None:
        yield
        return

    def look(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> Any:
        return False if mask is not None and is_causal is None else original(mask, is_causal, size)

    setattr(transformer, _LOOK, look)
    try:
        yield
    finally:
        setattr(transformer, _LOOK, original)
