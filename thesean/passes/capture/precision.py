"""What a guide's weights are kept in, told where it is not float32."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from thesean.units import quantity


def told_precision(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """ "weights in bfloat16 (1.1 G) and float32 (45 k)"; nothing where all are float32."""
    sizes: Counter[str] = Counter()
    for p in graph_module.parameters():
        if p.is_floating_point():
            sizes[str(p.dtype).removeprefix("torch.")] += p.numel()
    if set(sizes) <= {str(torch.float32).removeprefix("torch.")}:
        return ()
    if len(sizes) == 1:
        return (f"weights in {next(iter(sizes))}",)
    return ("weights in " + " and ".join(f"{name} ({quantity(size)})" for name, size in sizes.most_common()),)
