"""From a bound plan to a trained hybrid: closed form, alignment by stages, refit, fine-tuning, and a record of each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import fx

from thesean.distill.align import Aligner, StageResult, stages
from thesean.distill.closed_form import solve_parts
from thesean.distill.evaluate import Evaluation, Judge
from thesean.distill.fine_tune import fine_tune
from thesean.distill.observer import Observer
from thesean.distill.task import Batch, Task
from thesean.passes.graph.dump import not_dumping
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.recipe import Recipe
from thesean.targets import TargetModule

# Held-out batches that decide when a stage ends; the whole set is measured once a stage is over.
_CHECK_BATCHES = 4

State = dict[str, dict[str, torch.Tensor]]  # module name in the hybrid -> its state_dict


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The target modules right after a stage; `count` parts are replaced. Later stages do not touch it."""

    count: int
    state: State
    evaluation: Evaluation
    result: StageResult | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Conversion:
    hybrid: Hybrid
    snapshots: tuple[Snapshot, ...]  # one a part, in order
    guide: Evaluation
    final: Evaluation
    steps: int


def convert(
    bound_plan: BoundPlan,
    task: Task,
    recipe: Recipe,
    batches: Iterator[Batch],
    solving: Sequence[Batch],
    held_out: Sequence[Batch],
    observer: Observer,
) -> Conversion:
    """Run a recipe on a bound_plan. The guide is frozen; torch's seed decides the initial weights."""
    guide = bound_plan.captured.graph_module
    hybrid = build_hybrid(bound_plan)
    count = len(hybrid.parts)
    solving_inputs = [inputs for _, inputs in solving]
    schedule = recipe.alignment.schedule
    snapshots: list[Snapshot] = []
    judge = Judge(guide, task, held_out)
    told = judge(guide)  # first: a guide that returns NaN should not cost a conversion
    start = time.monotonic()

    prepare(guide, hybrid, solving_inputs)

    def snapshot(parts: int, result: StageResult | None) -> None:
        state = {r.name: deepcopy(hybrid.module(r).state_dict()) for r in hybrid.replacements if r.part < parts}
        partial = with_state(bound_plan, parts, state)
        snapshots.append(
            Snapshot(
                count=parts,
                state=state,
                evaluation=judge(partial.graph_module),
                result=result,
                seconds=time.monotonic() - start,
            )
        )

    def solve(parts: Sequence[int]) -> None:
        form = recipe.closed_form
        if form.enabled:
            solve_parts(guide, hybrid, parts, solving_inputs, ridge=form.ridge, solve_copied=form.solve_copied)

    taken = 0
    budget = round(recipe.steps * recipe.alignment.share)
    if schedule == "none" or budget == 0:
        for k in range(count):
            observer.begin("solve", hybrid.parts[k], k + 1, count, 0)
            solve([k])
            snapshot(k + 1, None)
            observer.end({"divergence": snapshots[-1].evaluation.divergence})
    else:
        if schedule in ("joint", "independent"):
            solve(range(count))
        aligner = Aligner(guide, hybrid, recipe, batches, solving_inputs, held_out[:_CHECK_BATCHES], observer)
        for stage in stages(schedule, count, budget):
            if schedule in ("progressive", "sequential"):
                solve([stage.number])  # on what the parts before it have become by now
            result = aligner.run(stage)
            taken += result.steps
            done = range(count) if stage.count == 1 else [stage.number]
            for k in done:
                snapshot(k + 1, result)
    # what alignment did not use goes to fine-tuning: plateaus shift steps, they don't lose them
    share = recipe.fine_tuning.share
    remaining = recipe.steps - taken if share > 0 else 0
    if remaining > 0:
        taken += fine_tune(guide, hybrid, task, recipe, batches, remaining, observer)
    hybrid.graph_module.eval()
    hybrid.graph_module.requires_grad_(True)
    return Conversion(
        hybrid=hybrid,
        snapshots=tuple(snapshots),
        guide=told,
        final=judge(hybrid.graph_module),
        steps=taken,
    )


@torch.no_grad()
def prepare(guide: fx.GraphModule, hybrid: Hybrid, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Show the guide's activations to the modules that choose by them, part after part to hold few at a time."""
    for r in hybrid.replacements:
        module = hybrid.module(r)
        if not isinstance(module, TargetModule) or type(module).prepare is TargetModule.prepare:
            continue
        ends = intermediates(guide, [r.guide_entry, r.guide_exit], with_output=False)
        values = [ends(**inputs) for inputs in batches]
        module.prepare(r.facts, [(v[r.guide_entry], v[r.guide_exit]) for v in values])


def with_state(bound_plan: BoundPlan, count: int, state: State) -> Hybrid:
    """The hybrid with the first `count` parts replaced by modules in this state, the rest the guide's."""
    with torch.random.fork_rng(devices=[]), not_dumping():
        hybrid = build_hybrid(bound_plan, count)
    for replacement in hybrid.replacements:
        hybrid.module(replacement).load_state_dict(state[replacement.name])
    hybrid.graph_module.eval()
    return hybrid
