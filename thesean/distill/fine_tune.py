"""End-to-end training of the converted network: task loss, annealed distillation, annealed hidden states.

loss = (1 - w) task(output) + w KL_T(guide | output) + h sum_k nmse(exit_k), w and h falling linearly to 0 at
`anneal_until` of the steps: a strong target is not held near a weak guide. Without a task loss, w stays 1.
"""

from __future__ import annotations

from typing import Any

import torch

from thesean.distill.align import examples, faint
from thesean.distill.seen import Seen, rows
from thesean.distill.task import Batch, Task
from thesean.distill.training import Training
from thesean.errors import DataError
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.hybrid import Hybrid
from thesean.similarity import get_measure


def fine_tune(hybrid: Hybrid, training: Training, steps: int, phase: str = "fine-tune") -> int:
    """Train all of the hybrid's parameters for `steps`; leaves it in eval mode. Returns the steps taken."""
    task, settings, observer = training.task, training.recipe.fine_tuning, training.observer
    nmse = get_measure("nmse")
    own_names = [own for own, _ in hybrid.boundaries]
    guide_names = [theirs for _, theirs in hybrid.boundaries]
    use_hidden = settings.hidden > 0
    use_guide = settings.distillation > 0 or use_hidden or task.loss is None
    seen = Seen(training.guide)
    own = intermediates(hybrid.graph_module, own_names if use_hidden else [])
    theirs = intermediates(training.guide, [*(guide_names if use_hidden else []), *seen.names])

    def loss_of(step: int, batch: Batch) -> torch.Tensor:
        whole, inputs = batch
        got = own(**inputs)
        left = max(0.0, 1 - step / (steps * settings.anneal_until))
        weight = settings.distillation * left if task.loss is not None else 1.0
        hidden = settings.hidden * left
        terms: list[Any] = []
        if task.loss is not None and weight < 1:
            terms.append((1 - weight) * _task_loss(task, got["output"], whole))
        if use_guide and (weight > 0 or hidden > 0):
            with torch.no_grad():
                wanted = theirs(**inputs)
            if weight > 0:
                masks = seen.of_outputs(wanted)
                off = task.outputs.distance(got["output"], wanted["output"], settings.temperature, masks)
                terms.append(weight * off)
            if hidden > 0:
                for y, g in zip(own_names, guide_names, strict=True):
                    mask_BT = seen.of(g, wanted)
                    if not faint(rows(wanted[g], mask_BT)):
                        pair = (examples(rows(z, mask_BT)) for z in (got[y], wanted[g]))
                        terms.append(hidden * nmse.loss(*pair))
        return torch.stack([t.reshape(()) for t in terms]).sum()

    observer.begin(phase, None, 1, 1, steps)
    hybrid.graph_module.train()
    taken = 0
    parameters = [p for p in hybrid.graph_module.parameters() if p.requires_grad]  # what the guide froze stays frozen
    if steps and parameters:
        taken = training.trainer.train(
            parameters,
            loss_of,
            training.feed.stream,
            steps=steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            where="fine-tuning",
        )
    hybrid.graph_module.eval()
    observer.end({})
    return taken


def _task_loss(task: Task, output: Any, batch: Any) -> torch.Tensor:
    """The user's loss; raises DataError unless it is a scalar that a gradient can flow from."""
    assert task.loss is not None
    value = task.loss(task.wrap(output), batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(
            f"loss(output, batch) returned {found}; expected a scalar tensor computed from output. "
            "Return a mean, and not .item() of it."
        )
    return value
