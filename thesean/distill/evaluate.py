"""How good a hybrid is on held-out batches: the user's loss and metric, and its divergence from the guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.distill.outputs import Kind, match_loss

Batch = tuple[Any, dict[str, torch.Tensor]]
Loss = Callable[[Any, Any], torch.Tensor]
Metric = Callable[[Any, Any], float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the user asked for: `loss(output, batch)`, `metric(output, batch)`, and how outputs are compared.

    `wrap` turns the graph's output into what the guide would have returned.
    """

    loss: Loss | None
    metric: Metric | None
    kind: Kind
    wrap: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over held-out batches. `divergence`: KL(guide | hybrid) in nats for logits, else the normalised MSE."""

    loss: float | None
    metric: float | None
    divergence: float


@torch.no_grad()
def evaluate(guide: fx.GraphModule, hybrid: fx.GraphModule, task: Task, batches: Sequence[Batch]) -> Evaluation:
    """Batches weigh by their first dimension. `hybrid` may be `guide` itself: its divergence is 0."""
    was_training = hybrid.training
    hybrid.eval()
    total = {"loss": 0.0, "metric": 0.0, "divergence": 0.0}
    count = 0
    for batch, inputs in batches:
        size = next(iter(inputs.values())).shape[0]
        output = hybrid(**inputs)
        wrapped = task.wrap(output)
        if hybrid is not guide:
            total["divergence"] += match_loss(output, guide(**inputs), task.kind).item() * size
        if task.loss is not None:
            total["loss"] += float(task.loss(wrapped, batch)) * size
        if task.metric is not None:
            total["metric"] += float(task.metric(wrapped, batch)) * size
        count += size
    hybrid.train(was_training)
    return Evaluation(
        loss=total["loss"] / count if task.loss is not None else None,
        metric=total["metric"] / count if task.metric is not None else None,
        divergence=total["divergence"] / count,
    )
