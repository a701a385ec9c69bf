"""What a conversion has to beat: the same target from scratch, and plain logit distillation, at equal steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from thesean.distill.fine_tune import fine_tune
from thesean.distill.observer import Observer
from thesean.distill.task import Batch, Task
from thesean.errors import DataError, unknown_name
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.passes.reinitialise import Reinitialise
from thesean.recipe import Recipe

BaselineKind = Literal["scratch", "distillation"]
KINDS: tuple[BaselineKind, ...] = ("scratch", "distillation")


def baseline_recipe(kind: BaselineKind, recipe: Recipe, learning_rate: float | None = None) -> Recipe:
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
    bound_plan: BoundPlan, task: Task, recipe: Recipe, batches: Iterator[Batch], observer: Observer, kind: BaselineKind
) -> tuple[Hybrid, int]:
    """The fully replaced architecture with nothing of the guide's weights, trained for `recipe.steps`."""
    if kind == "scratch" and task.loss is None:
        raise DataError("the baseline 'scratch' needs a task: pass loss=.")
    hybrid = build_hybrid(bound_plan, copy_weights=False)
    Reinitialise()(hybrid.graph_module)
    steps = fine_tune(
        bound_plan.captured.graph_module, hybrid, task, recipe, batches, recipe.steps, observer, phase=kind
    )
    return hybrid, steps
