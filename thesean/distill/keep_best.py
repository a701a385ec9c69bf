"""Which parts stay the guide's where some may: those whose return helps most.

Every part is replaced and solved, on few batches; then each in turn is the guide's again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from thesean.distill.closed_form import solver_by
from thesean.distill.evaluate import Judge
from thesean.distill.training import Training
from thesean.errors import PlanError
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import trial_hybrid, view_of
from thesean.passes.plan.without import without

logger = logging.getLogger(__name__)

# For a rank order of parts; a part's return is far from what a batch more would tell.
_SOLVED_ON, _JUDGED_ON = 4, 2


def keep_best(bound_plan: BoundPlan, training: Training) -> BoundPlan:
    """The plan with as many parts kept as the recipe asks for. Raises PlanError where none would be replaced."""
    count, replaced = training.recipe.keep_best, [p.planned.path for p in bound_plan.parts if p.target is not None]
    if not count:
        return bound_plan
    if count >= len(replaced):
        raise PlanError(f"keep_best={count}: the plan replaces {len(replaced)} parts, and one at least must be.")
    found: dict[str, Any] = training.journal.piece("keep", lambda: _returns(bound_plan, replaced, training))
    whole, alone = float(found["whole"]), {path: float(value) for path, value in found["alone"].items()}
    for path in sorted(alone, key=lambda path: (math.isnan(alone[path]), alone[path]))[:count]:
        why = f"kept: with all replaced the network is {whole:.4g} from the guide, without this one {alone[path]:.4g}"
        bound_plan = without(bound_plan, path, why)
    return bound_plan


def _returns(bound_plan: BoundPlan, paths: Sequence[str], training: Training) -> dict[str, Any]:
    """The divergence of the hybrid, and of those with one part less."""
    batches = training.feed.take(_SOLVED_ON)
    hybrid = trial_hybrid(bound_plan, share=True)
    parts = range(len(hybrid.parts))
    solving = training.inputs(batches)
    solver = solver_by(training.recipe.closed_form, training.guide, hybrid, parts, solving, preparing=True)
    for number, path in enumerate(paths):
        training.observer.begin("keep", path, number + 1, len(paths), 0)
        solver.solve(number)
        training.observer.end({})
    # on what it was solved on: what is held out tells how good the choice is
    judge = Judge(training.guide, replace(training.task, loss=None, metric=None), batches[:_JUDGED_ON])
    alone = {}
    for number, path in enumerate(paths):
        view = view_of(bound_plan, hybrid, [k for k in parts if k != number])
        alone[path] = judge(view.graph_module).divergence
        logger.info("%s: %.4g without it", path, alone[path])
    return {"whole": judge(hybrid.graph_module).divergence, "alone": alone}
