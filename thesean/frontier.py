"""What a run ends with: the converted network, its report, and the frontier of partial conversions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from thesean.choose.choose import UNMET
from thesean.converted import Converted, Frontier
from thesean.distill.evaluate import Evaluation
from thesean.distill.snapshot import Snapshot, with_state
from thesean.distill.stages import Conversion
from thesean.distill.training import Training
from thesean.errors import LostError, NumericalError
from thesean.origin import with_origin
from thesean.passes.plan.bind import BoundPlan, added_params
from thesean.passes.plan.hybrid import bound_positions
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.without import STALE
from thesean.recipe import Recipe
from thesean.report.conversion import ConversionReport, StageRow
from thesean.warn import warn


def finish(training: Training, conversion: Conversion, start: float, rehearsed: Sequence[str] = ()) -> Converted:
    """The converted network with its report; `start` is when the run began, on the monotonic clock, `rehearsed` what
    was found out before it was trained. Raises NumericalError for one whose outputs are NaN; warns of a loss or a
    metric that is.
    """
    bound_plan = conversion.bound_plan
    hybrid, recipe, feed = conversion.hybrid, training.recipe, training.feed
    bound_plan = replace(bound_plan, captured=with_origin(bound_plan.captured))
    if not math.isfinite(conversion.final.divergence):
        raise NumericalError(
            f"the converted network's outputs on held-out batches are not finite (divergence "
            f"{conversion.final.divergence}): its target computes NaN or infinity, or training diverged. Lower the "
            "recipe's learning rates, or choose another target."
        )
    notes = [
        *feed.notes,
        *rehearsed,
        training.task.outputs.told,
        *conversion.notes,
        *training.journal.told,
        *(note for note in bound_plan.plan.notes if note.startswith((UNMET, STALE))),
    ]
    new = tuple(f"{replacement.name}." for replacement in hybrid.replacements)
    frozen = [name for name, p in hybrid.graph_module.named_parameters() if not p.requires_grad]
    if frozen := [name for name in frozen if not name.startswith(new)]:
        some = ", ".join(frozen[:3]) + (", ..." if len(frozen) > 3 else "")
        notes.append(f"frozen in the guide and left as they were (requires_grad=False): {some}")
    if told := bound_positions(hybrid.graph_module, recipe.positions):
        notes.append(told)
    own = conversion.final.told("the converted network")
    warn(own)
    notes += [f"warning: {told}" for told in (*conversion.guide.told("the guide"), *own)]
    report = ConversionReport(
        guide=_figures(conversion.guide),
        converted=_figures(conversion.final),
        stages=_stage_rows(bound_plan, conversion, recipe),
        steps=conversion.steps,
        seconds=time.monotonic() - start,
        params=sum(p.numel() for p in hybrid.graph_module.parameters()),
        flops=bound_plan.plan.new_flops,
        train_length=feed.length,
        recipe=recipe.model_dump(),
        seed=training.seed,
        notes=tuple(notes),
        copied={r.facts.path: list(r.copied) for r in hybrid.replacements if r.copied},
        curves=conversion.curves,
    )
    converted = Converted(hybrid.graph_module, bound_plan.captured.signature, bound_plan.plan, report)
    makers: list[Callable[[], Converted]] = []
    if bound_plan.plan.replaced:
        makers.append(partial(_hybrid, bound_plan, None, report, recipe))
    makers += [partial(_hybrid, bound_plan, s, report, recipe) for s in conversion.snapshots[:-1]]
    converted.frontier = Frontier([*makers, lambda: converted])
    if conversion.lost:
        error = LostError(conversion.lost)
        error.converted = converted
        raise error
    return converted


def _hybrid(bound_plan: BoundPlan, snapshot: Snapshot | None, report: ConversionReport, recipe: Recipe) -> Converted:
    """The frontier's member after a stage, on demand."""
    numbers = snapshot.parts if snapshot is not None else ()
    hybrid = with_state(bound_plan, numbers, snapshot.state if snapshot is not None else {})
    bound_positions(hybrid.graph_module, recipe.positions)
    replaced = {bound_plan.plan.replaced[k].path for k in numbers}
    rows = tuple(
        p if p.path in replaced else replace(p, target="keep", options={}, scope=None) for p in bound_plan.plan
    )
    told = replace(
        report,
        converted=_figures(snapshot.evaluation) if snapshot is not None else report.guide,
        stages=report.stages[: len(numbers)],
        params=sum(p.numel() for p in hybrid.graph_module.parameters()),
        flops=_flops_with(bound_plan.plan, numbers),
    )
    return Converted(hybrid.graph_module, bound_plan.captured.signature, replace(bound_plan.plan, parts=rows), told)


def _flops_with(plan: Plan, parts: Sequence[int]) -> int:
    return plan.flops + sum(plan.replaced[k].new_flops - plan.replaced[k].flops for k in parts)


def _stage_rows(bound_plan: BoundPlan, conversion: Conversion, recipe: Recipe) -> tuple[StageRow, ...]:
    rows = []
    replaced = bound_plan.plan.replaced
    seconds = 0.0
    for snapshot in conversion.snapshots:
        result = snapshot.result
        divergence = snapshot.evaluation.divergence
        rows.append(
            StageRow(
                part=conversion.hybrid.parts[snapshot.parts[-1]],
                replaced=snapshot.count,
                of=len(conversion.hybrid.parts),
                measure=result.measure if result else ("closed form" if recipe.closed_form.enabled else "none"),
                before=result.before if result else None,
                after=result.after if result else divergence,
                loss=snapshot.evaluation.loss,
                metric=snapshot.evaluation.metric,
                divergence=divergence,
                steps=result.steps if result else 0,
                seconds=snapshot.seconds - seconds,
                stopped_by=result.stopped_by if result else ("solved" if recipe.closed_form.enabled else "not solved"),
                params=bound_plan.plan.params + sum(added_params(replaced[k]) for k in snapshot.parts),
                flops=_flops_with(bound_plan.plan, snapshot.parts),
            )
        )
        seconds = snapshot.seconds
    return tuple(rows)


def _figures(evaluation: Evaluation) -> dict[str, float | None]:
    return {"loss": evaluation.loss, "metric": evaluation.metric, "divergence": evaluation.divergence}
