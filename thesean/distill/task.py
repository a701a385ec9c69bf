"""What the user asked for, what the hybrid's output should match in the guide's, and how far it is off.

B batch, T time, V classes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from thesean.errors import DataError

Batch = tuple[Any, dict[str, torch.Tensor]]
Loss = Callable[[Any, Any], torch.Tensor]
Metric = Callable[[Any, Any], float]
OutputKind = Literal["logits", "features"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the user asked for: `loss(output, batch)`, `metric(output, batch)`, and how outputs are compared.

    `wrap` turns the graph's output into what the guide would have returned.
    """

    loss: Loss | None
    metric: Metric | None
    kind: OutputKind
    wrap: Callable[[Any], Any]


def primary(output: Any) -> torch.Tensor:
    """The first floating-point tensor of an output; "logits" where the guide calls one so."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor):
        return output["logits"]
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim:
            return leaf
    raise DataError("the guide's output holds no floating-point tensor; there is nothing to match.")


def output_kind(output: Any, has_class_labels: bool) -> OutputKind:
    """Logits where the guide says so or integer labels come with the data; features otherwise."""
    named = isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor)
    return "logits" if named or (has_class_labels and primary(output).shape[-1] > 1) else "features"


def match_loss(output: Any, guide: Any, kind: OutputKind, temperature: float = 1.0) -> torch.Tensor:
    """Distillation: KL(guide | hybrid) at a temperature, times its square (Hinton et al. 2015), averaged over
    positions; for features the normalised MSE |y - g|^2 / |g - mean g|^2 of every output tensor.
    """
    if kind == "logits":
        y, g = (primary(o).flatten(0, -2) / temperature for o in (output, guide))
        kl = F.kl_div(F.log_softmax(y, -1), F.log_softmax(g, -1), log_target=True, reduction="batchmean")
        return kl * temperature**2
    pairs = [
        (y, g)
        for y, g in zip(pytree.tree_leaves(output), pytree.tree_leaves(guide), strict=True)
        if isinstance(g, torch.Tensor) and g.is_floating_point()
    ]
    terms = []
    for y, g in pairs:
        spread = (g - g.mean(0, keepdim=True)).square().sum()
        terms.append((y - g).square().sum() / spread.clamp_min(1e-12 * g.numel()))
    return torch.stack(terms).mean()
