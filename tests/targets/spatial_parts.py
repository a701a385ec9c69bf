"""Parts of convolutional networks as the passes would describe them."""

from __future__ import annotations

from typing import Any

from thesean.targets import PartFacts


def map_part(input_shape: tuple[Any, ...], output_shape: tuple[Any, ...] | None = None, **facts: Any) -> PartFacts:
    """(C, H, W) in and out, behind a dynamic batch."""
    out = input_shape if output_shape is None else output_shape
    settings: dict[str, Any] = {"path": "layer3.1", "mixing": "bidirectional", "params": 10_000, **facts}
    return PartFacts(input_shape=("batch", *input_shape), output_shape=("batch", *out), **settings)
