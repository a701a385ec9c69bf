"""What a conversion has to beat: the same target from scratch, and plain logit distillation, at equal steps."""

from __future__ import annotations

import math
from typing import Literal

from thesean.distill.fine_tune import fine_tune
from thesean.distill.stages import Conversion
from thesean.distill.training import Training
from thesean.errors import DataError, unknown_name
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.reinitialise import Reinitialise
from thesean.recipe import Recipe
from thesean.targets.shared.sequence import SmallLinear

BaselineKind = Literal["scratch", "distillation"]
KINDS: tuple[BaselineKind, ...] = ("scratch", "distillation")


def baseline_recipe(kind: BaselineKind, recipe: Recipe, learning_rate: float | None = None) -> Recipe:
    """The recipe's steps and clipping, all of them end to end; "distillation" keeps its weight and annealing."""
    if kind not in KINDS:
        raise unknown_name("baseline", kind, KINDS)
    if learning_rate is not None and not (isinstance(learning_rate, float | int) and 0 < learning_rate < math.inf):
        raise DataError(f"learning_rate: expected a number above 0, found {learning_rate!r}.")
    tuning = recipe.fine_tuning
    settings = {
        "share": 1.0,
        "hidden": 0.0,
        "distillation": 0.0 if kind == "scratch" else (tuning.distillation or 0.9),
        "learning_rate": learning_rate or tuning.learning_rate,
    }
    return recipe.model_copy(update={"name": kind, "fine_tuning": tuning.model_copy(update=settings)})


def train_baseline(bound_plan: BoundPlan, training: Training, kind: BaselineKind) -> Conversion:
    """The fully replaced architecture with nothing of the guide's weights, trained for the recipe's steps."""
    if kind == "scratch" and training.task.loss is None:
        raise DataError("the baseline 'scratch' needs a task: pass loss=.")
    hybrid = build_hybrid(bound_plan, copy_weights=False)
    Reinitialise()(hybrid.graph_module)
    for module in hybrid.graph_module.modules():
        if isinstance(module, SmallLinear):
            module.reset_parameters()
    training.try_loss()
    guide = training.judge_guide()  # first: a guide that returns NaN should not cost a training
    tuned = fine_tune(hybrid, training, training.recipe.steps, phase=kind)
    final = training.judge(hybrid.graph_module)
    return Conversion(
        bound_plan=bound_plan,
        hybrid=hybrid,
        snapshots=(),
        guide=guide,
        final=final,
        steps=tuned.steps,
        notes=(*tuned.notes, *training.spared),
        curves=tuned.curves,
    )
