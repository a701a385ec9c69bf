"""From a bound plan to a trained hybrid: closed form, alignment by stages, refit, fine-tuning, and a record of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import fx

from thesean.distill.align import Aligner, StageResult, stages
from thesean.distill.closed_form import solve_parts
from thesean.distill.evaluate import Evaluation
from thesean.distill.fine_tune import fine_tune
from thesean.distill.training import Training
from thesean.passes.graph.dump import not_dumping
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.targets import TargetModule

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
class Aligned:
    """What alignment leaves beside the hybrid: a snapshot a part, the guide's own figures, and the steps it took."""

    snapshots: tuple[Snapshot, ...]
    guide: Evaluation
    steps: int


@dataclass(frozen=True, kw_only=True)
class Conversion:
    hybrid: Hybrid
    snapshots: tuple[Snapshot, ...]  # one a part, in order
    guide: Evaluation
    final: Evaluation
    steps: int


def align(bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> Aligned:
    """Bring the hybrid's parts near the guide: initialise with its activations, solve, align stage by stage.

    A snapshot is taken after each part. Raises NumericalError for a guide that returns NaN, before anything else.
    """
    guide = training.judge(training.guide)
    aligning = _Aligning(bound_plan, hybrid, training)
    schedule, count = training.recipe.alignment.schedule, len(hybrid.parts)
    budget = round(training.recipe.steps * training.recipe.alignment.share)
    prepare(training.guide, hybrid, aligning.solving)
    if schedule == "none" or budget == 0:
        for k in range(count):
            training.observer.begin("solve", hybrid.parts[k], k + 1, count, 0)
            aligning.solve([k])
            aligning.snapshot(k + 1, None)
            training.observer.end({"divergence": aligning.snapshots[-1].evaluation.divergence})
    else:
        if schedule in ("joint", "independent"):
            aligning.solve(range(count))
        aligner = Aligner(hybrid, training, aligning.solving)
        for stage in stages(schedule, count, budget):
            if schedule in ("progressive", "sequential"):
                aligning.solve([stage.number])  # on what the parts before it have become by now
            result = aligner.run(stage)
            for k in range(count) if stage.count == 1 else [stage.number]:
                aligning.snapshot(k + 1, result)
    results = {id(s.result): s.result for s in aligning.snapshots if s.result is not None}
    return Aligned(
        snapshots=tuple(aligning.snapshots), guide=guide, steps=sum(result.steps for result in results.values())
    )


def tune(hybrid: Hybrid, training: Training, aligned: Aligned) -> Conversion:
    """Fine-tune end to end with the steps that alignment left over: plateaus shift steps, they don't lose them."""
    steps = training.recipe.steps - aligned.steps if training.recipe.fine_tuning.share > 0 else 0
    taken = fine_tune(hybrid, training, steps) if steps > 0 else 0
    hybrid.graph_module.eval()
    return Conversion(
        hybrid=hybrid,
        snapshots=aligned.snapshots,
        guide=aligned.guide,
        final=training.judge(hybrid.graph_module),
        steps=aligned.steps + taken,
    )


class _Aligning:
    """One alignment under way: what feeds the closed form, and the snapshots so far."""

    def __init__(self, bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> None:
        self.bound_plan, self.hybrid, self.training = bound_plan, hybrid, training
        self.solving = [inputs for _, inputs in training.feed.take(training.recipe.closed_form.batches)]
        self.snapshots: list[Snapshot] = []
        self._start = time.monotonic()

    def solve(self, parts: Sequence[int]) -> None:
        form = self.training.recipe.closed_form
        if form.enabled:
            ridge, copied = form.ridge, form.solve_copied
            solve_parts(self.training.guide, self.hybrid, parts, self.solving, ridge=ridge, solve_copied=copied)

    def snapshot(self, parts: int, result: StageResult | None) -> None:
        hybrid = self.hybrid
        state = {r.name: deepcopy(hybrid.module(r).state_dict()) for r in hybrid.replacements if r.part < parts}
        with not_dumping():  # the hybrid's own cuts are told already
            partial = with_state(self.bound_plan, parts, state)
        self.snapshots.append(
            Snapshot(
                count=parts,
                state=state,
                evaluation=self.training.judge(partial.graph_module),
                result=result,
                seconds=time.monotonic() - self._start,
            )
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
