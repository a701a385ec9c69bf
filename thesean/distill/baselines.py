"""What a conversion has to beat: the same target from scratch, and plain logit distillation, at equal steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from thesean.distill.evaluate import Batch, Task
from thesean.distill.finetune import fine_tune
from thesean.distill.observer import Observer
from thesean.errors import DataError, unknown_name
from thesean.passes.drafter import Draft
from thesean.passes.hybrid import Hybrid, build_hybrid
from thesean.passes.reinitialise import Reinitialise
from thesean.recipe import Recipe

Kind = Literal["scratch", "distillation"]
KINDS: tuple[Kind, ...] = ("scratch", "distillation")


def baseline_recipe(kind: Kind, recipe: Recipe, learning_rate: float | None = None) -> Recipe:
    """The recipe's steps and clipping, all of them end to end; "distillation" keeps its weight and annealing."""
    if kind not in KINDS:
        raise unknown_name("baseline", kind, KINDS)
    tuning = recipe.fine_tuning
    settings = {
        "share": 1.0,
        "hidden": 0.0,
        "distillation": 0.0 if kind == "scratch" else (tuning.distillation or 0.9),
        "learning_rate": learning_rate or tuning.learning_rate,
    }
    return recipe.model_copy(update={"name": kind, "fine_tuning": tuning.model_copy(update=settings)})


def train_baseline(
    draft: Draft, task: Task, recipe: Recipe, batches: Iterator[Batch], observer: Observer, kind: Kind
) -> tuple[Hybrid, int]:
    """The fully replaced architecture with nothing of the guide's weights, trained for `recipe.steps`."""
    if kind == "scratch" and task.loss is None:
        raise DataError("the baseline 'scratch' needs a task: pass loss=.")
    hybrid = build_hybrid(draft, copy_weights=False)
    Reinitialise()(hybrid.graph_module)
    steps = fine_tune(draft.captured.graph_module, hybrid, task, recipe, batches, recipe.steps, observer, phase=kind)
    return hybrid, steps
