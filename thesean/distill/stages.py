"""From a bound plan to a trained hybrid: closed form, alignment by stages, refit, fine-tuning, and a record of each."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from thesean.curve import Curve
from thesean.distill.align import Aligner, Stage, StageResult, stages
from thesean.distill.best import Best
from thesean.distill.closed_form import Solver, solve_parts
from thesean.distill.evaluate import Evaluation, Judge
from thesean.distill.fine_tune import Tuned, fine_tune
from thesean.distill.partial import Partials, stand_apart
from thesean.distill.random_state import RandomState
from thesean.distill.training import Training
from thesean.passes.graph.dump import not_dumping
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import unshare
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, Replacement, build_hybrid

# Stages are judged on so many held-out batches, or on more where that costs no more than solving does. To judge each of
# n stages runs what is left of the guide, n / 2 forwards a batch: past so many stages fewer batches are taken, or some
# rows of one where that is still more than what is solved on, so that the cost of all grows with the layers and not by
# their square.
_JUDGED_BATCHES, _STAGES = 4, 12

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
    curves: tuple[Curve, ...] = ()
    judged_on_some: bool = False  # whether snapshots were judged on fewer batches than all that are held out
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conversion:
    hybrid: Hybrid
    snapshots: tuple[Snapshot, ...]  # one a part, in order
    guide: Evaluation
    final: Evaluation
    steps: int
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()


def align(bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> Aligned:
    """Bring the hybrid's parts near the guide: initialise with its activations, solve, align stage by stage.

    A snapshot is taken after each part. Raises NumericalError for a guide that returns NaN, before anything else.
    """
    journal = training.journal
    journal.always = (RandomState(), training.feed.stream)
    guide = training.judge_guide()
    aligning = _Aligning(bound_plan, hybrid, training)
    journal.piece("align", aligning.run, aligning)
    results = {s.result.stage.number: s.result for s in aligning.snapshots if s.result is not None}
    return Aligned(
        snapshots=tuple(aligning.snapshots),
        guide=guide,
        steps=sum(result.steps for result in results.values()),
        curves=tuple(result.curve for result in results.values()),
        judged_on_some=bool(aligning.judged_on),
        notes=(*aligning.notes, *([aligning.judged_on] if aligning.judged_on else [])),
    )


def tune(hybrid: Hybrid, training: Training, aligned: Aligned) -> Conversion:
    """Fine-tune end to end with the steps that alignment left over: plateaus shift steps, they don't lose them."""
    steps = training.recipe.steps - aligned.steps if training.recipe.fine_tuning.share > 0 else 0
    tuned = Tuned(steps=0)
    if steps > 0:
        unshare(hybrid.graph_module, training.guide)
        tuned = fine_tune(hybrid, training, steps)
    hybrid.graph_module.eval()
    last = aligned.snapshots[-1].evaluation if aligned.snapshots else None
    final = training.judge(hybrid.graph_module) if tuned.steps or last is None or aligned.judged_on_some else last
    training.judge.forget()
    unshare(hybrid.graph_module, training.guide)  # whoever gets it may train it
    return Conversion(
        hybrid=hybrid,
        snapshots=aligned.snapshots,
        guide=aligned.guide,
        final=final,
        steps=aligned.steps + tuned.steps,
        notes=(*aligned.notes, *tuned.notes),
        curves=(*aligned.curves, *tuned.curves),
    )


class _Aligning:
    """One alignment under way: what feeds the closed form, and the snapshots so far."""

    def __init__(self, bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> None:
        self.bound_plan, self.hybrid, self.training = bound_plan, hybrid, training
        self.solving = [inputs for _, inputs in training.feed.take(training.recipe.closed_form.batches)]
        self.snapshots: list[Snapshot] = []
        self.notes: list[str] = []
        self._start = time.monotonic()
        self._latest: dict[str, tuple[list[int], dict[str, torch.Tensor]]] = {}
        # taken before anything is solved: in between, what stays would leave holes where the rest was
        self._room = {r.name: deepcopy(hybrid.module(r).state_dict()) for r in hybrid.replacements}
        self._apart = stand_apart(bound_plan, hybrid)
        held_out = training.feed.held_out
        count = len(hybrid.parts)
        most = max(1, _JUDGED_BATCHES * max(min(count, _STAGES), len(self.solving)) // count)
        self._judged = [inputs for _, inputs in held_out[:most]]
        self._judge = training.judge
        self.judged_on = ""
        if len(self._judged) < len(held_out):
            self.judged_on = f"stages were judged on the first {len(self._judged)} of {len(held_out)} held-out batches"
        if count > _STAGES and len(self._judged) == 1:
            self._judge_rows(bound_plan.captured.signature)

    def _judge_rows(self, signature: Signature) -> None:
        """Where one batch is too many: some of its rows, by the divergence alone, for a loss reads whole batches."""
        sizes = [signature.check(inputs).get("batch", 1) for inputs in (*self.solving, *self._judged)]
        rows = max(1, 2 * sum(sizes[:-1]) // len(self.hybrid.parts))
        if rows < sizes[-1]:
            few = signature.first_rows(self._judged[0], rows)
            self._judged = [few]
            task = replace(self.training.task, loss=None, metric=None)
            self._judge = Judge(self.training.guide, task, [(few, few)])
            self.judged_on = (
                f"stages were judged by the divergence on {rows} of the {sizes[-1]} rows of a held-out batch"
            )

    def run(self) -> None:
        schedule, count = self.training.recipe.alignment.schedule, len(self.hybrid.parts)
        budget = round(self.training.recipe.steps * self.training.recipe.alignment.share)
        if schedule == "none" or budget == 0:
            self._solve_all()
            return
        unshare(self.hybrid.graph_module, self.training.guide)
        self.training.journal.piece("solve", self._prepare, self)
        aligner = Aligner(self.hybrid, self.training, self.solving)
        for stage in stages(schedule, count, budget):
            self.training.journal.piece(f"stage {stage.number + 1}", partial(self._run_stage, aligner, stage), self)

    def _solve_all(self) -> None:
        solver, observer, parts = self.solver(preparing=True), self.training.observer, self.hybrid.parts
        for k, part in enumerate(parts):
            observer.begin("solve", part, k + 1, len(parts), 0)
            solver.solve(k)
            self.snapshot(k + 1, None)
            observer.end({"divergence": self.snapshots[-1].evaluation.divergence})

    def _prepare(self) -> None:
        """All that comes before stages; those one after the other solve their part on what the ones before became."""
        prepare(self.training.guide, self.hybrid, self.solving)
        if self.training.recipe.alignment.schedule in ("joint", "independent"):
            self.solve(range(len(self.hybrid.parts)))

    def _run_stage(self, aligner: Aligner, stage: Stage) -> None:
        if self.training.recipe.alignment.schedule in ("progressive", "sequential"):
            self.solve([stage.number])
            result = aligner.run(stage)
            self.partials.forget()
            self.snapshot(stage.number + 1, result)
            return
        solved = Best([self.hybrid.module(r) for r in self.hybrid.replacements])
        solved.offer(self._value())
        result = aligner.run(stage)
        if math.isfinite(solved.value):
            if not solved.offer(self._value()):
                self.notes.append("alignment did not help: kept what the closed form gave")
            solved.restore()
        self.partials.forget()
        for k in range(len(self.hybrid.parts)):
            self.snapshot(k + 1, result)

    def _value(self) -> float:
        """Of the whole hybrid on the held-out batches, lower is better."""
        return self.training.judge(self.hybrid.graph_module).value

    def state_dict(self) -> dict[str, Any]:
        """Modules, and what stages left behind."""
        return {
            "modules": {r.name: self.hybrid.module(r).state_dict() for r in self.hybrid.replacements},
            "snapshots": [
                {
                    "count": s.count,
                    "state": s.state,
                    "evaluation": asdict(s.evaluation),
                    "result": None if s.result is None else asdict(s.result),
                    "seconds": s.seconds,
                }
                for s in self.snapshots
            ],
            "notes": list(self.notes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for r in self.hybrid.replacements:
            self.hybrid.module(r).load_state_dict(state["modules"][r.name])
        self.snapshots = [
            Snapshot(
                count=s["count"],
                state=s["state"],
                evaluation=Evaluation(**s["evaluation"]),
                result=None if s["result"] is None else StageResult.from_dict(s["result"]),
                seconds=s["seconds"],
            )
            for s in state["snapshots"]
        ]
        self.notes = list(state["notes"])

    @cached_property
    def partials(self) -> Partials:
        return Partials(self.training.guide, self.hybrid, self._judged)

    def solver(self, preparing: bool) -> Solver:
        """Of all parts, in their order."""
        form = self.training.recipe.closed_form
        return Solver(
            self.training.guide,
            self.hybrid,
            range(len(self.hybrid.parts)),
            self.solving,
            ridge=form.ridge if form.enabled else None,
            solve_copied=form.solve_copied,
            preparing=preparing,
        )

    def solve(self, parts: Sequence[int]) -> None:
        form = self.training.recipe.closed_form
        if form.enabled:
            ridge, copied = form.ridge, form.solve_copied
            solve_parts(self.training.guide, self.hybrid, parts, self.solving, ridge=ridge, solve_copied=copied)

    def snapshot(self, parts: int, result: StageResult | None) -> None:
        state = {r.name: self._state_of(r) for r in self.hybrid.replacements if r.part < parts}
        self.snapshots.append(
            Snapshot(
                count=parts,
                state=state,
                evaluation=self._evaluate(parts, state),
                result=result,
                seconds=time.monotonic() - self._start,
            )
        )

    def _state_of(self, replacement: Replacement) -> dict[str, torch.Tensor]:
        """A copy of a module's state; the one before where nothing was written to it since."""
        now = self.hybrid.module(replacement).state_dict()
        writes = [-1 if v.is_inference() else v._version for v in now.values()]
        kept = self._latest.get(replacement.name)
        if kept is None or -1 in writes or kept[0] != writes:
            copy = self._room.pop(replacement.name, None) or deepcopy(now)
            for name, value in now.items():
                copy[name].copy_(value)
            self._latest[replacement.name] = kept = writes, copy
        return kept[1]

    def _evaluate(self, parts: int, state: State) -> Evaluation:
        """The hybrid with the first `parts` parts as they are now, and the guide's elsewhere."""
        judge = self._judge
        if not self._apart:
            partial = with_state(self.bound_plan, parts, state)
            return judge.of(lambda number: partial.graph_module(**self._judged[number]), range(len(self._judged)))
        with evaluating(self.hybrid.graph_module):
            return judge.of(lambda number: self.partials.output(parts, number), range(len(self._judged)))


def prepare(guide: fx.GraphModule, hybrid: Hybrid, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Show the guide's activations to the modules that choose by them, part after part to hold few at a time."""
    parts = range(len(hybrid.parts))
    solver = Solver(guide, hybrid, parts, batches, ridge=None, preparing=True)
    for part in parts:
        solver.solve(part)


def with_state(bound_plan: BoundPlan, count: int, state: State) -> Hybrid:
    """The hybrid with the first `count` parts replaced by modules in this state, the rest the guide's."""
    with torch.random.fork_rng(devices=[]), not_dumping():
        hybrid = build_hybrid(bound_plan, count)
    for replacement in hybrid.replacements:
        hybrid.module(replacement).load_state_dict(state[replacement.name])
    hybrid.graph_module.eval()
    return hybrid
