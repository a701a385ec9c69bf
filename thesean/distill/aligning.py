"""One alignment under way, part after part: what feeds the closed form, the stages, and the snapshots so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from thesean.distill.align import Aligner, Stage, StageResult, stages
from thesean.distill.best import Best
from thesean.distill.budget import Shares, shared
from thesean.distill.closed_form import Solver, solve_parts
from thesean.distill.evaluate import Evaluation, Judge
from thesean.distill.partial import Partials, stand_apart
from thesean.distill.snapshot import Snapshot, State, with_state
from thesean.distill.training import Training
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import unshare
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, Replacement

# Stages are judged on so many held-out batches, or on more where that costs no more than solving does. To judge each of
# n stages runs what is left of the guide, n / 2 forwards a batch: past so many stages fewer batches are taken, or some
# rows of one where that is still more than what is solved on, so that the cost of all grows with the layers and not by
# their square.
_JUDGED_BATCHES, _STAGES = 4, 12


class Aligning:
    """One alignment under way: what feeds the closed form, and the snapshots so far."""

    def __init__(self, bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> None:
        self.training = training
        self.solving = [inputs for _, inputs in training.feed.take(training.recipe.closed_form.batches)]
        self.snapshots: list[Snapshot] = []
        self.results: list[StageResult] = []  # of all that was trained, kept or not
        self.notes: list[str] = []
        self._start = time.monotonic()
        self.take(bound_plan, hybrid)
        self.shares: Shares | None = None
        self.unshared = False  # whether the hybrid may be trained
        held_out = training.feed.held_out
        count = len(hybrid.parts)
        most = max(1, _JUDGED_BATCHES * max(min(count, _STAGES), len(self.solving)) // count)
        self._judged = [inputs for _, inputs in held_out[:most]]
        self.judge = training.judge
        self.judged_on = ""
        if len(self._judged) < len(held_out):
            self.judged_on = f"stages were judged on the first {len(self._judged)} of {len(held_out)} held-out batches"
        if count > _STAGES and len(self._judged) == 1:
            self._judge_rows(bound_plan.captured.signature)

    def take(self, bound_plan: BoundPlan, hybrid: Hybrid) -> None:
        """Go on with this hybrid."""
        self.bound_plan, self.hybrid = bound_plan, hybrid
        self._latest: dict[str, tuple[list[int], dict[str, torch.Tensor]]] = {}
        # taken before anything is solved: in between, what stays would leave holes where the rest was
        self._room = {r.name: deepcopy(hybrid.module(r).state_dict()) for r in hybrid.replacements}
        self._apart = stand_apart(bound_plan, hybrid)
        self.__dict__.pop("partials", None)

    def _judge_rows(self, signature: Signature) -> None:
        """Where one batch is too many: some of its rows, by the divergence alone, for a loss reads whole batches."""
        sizes = [signature.check(inputs).get("batch", 1) for inputs in (*self.solving, *self._judged)]
        rows = max(1, 2 * sum(sizes[:-1]) // len(self.hybrid.parts))
        if rows < sizes[-1]:
            few = signature.first_rows(self._judged[0], rows)
            self._judged = [few]
            task = replace(self.training.task, loss=None, metric=None)
            self.judge = Judge(self.training.guide, task, [(few, few)])
            self.judged_on = (
                f"stages were judged by the divergence on {rows} of the {sizes[-1]} rows of a held-out batch"
            )

    @property
    def staged(self) -> bool:
        """Whether there is more than a closed form."""
        alignment = self.training.recipe.alignment
        return alignment.schedule != "none" and round(self.training.recipe.steps * alignment.share) > 0

    def run(self) -> None:
        if not self.staged:
            self._solve_all()
            self._share()
            return
        self.unshare()
        self.training.journal.piece("solve", self._prepare, self)
        self._share()
        steps = round(self.training.recipe.steps * self.training.recipe.alignment.share)
        steps = steps if self.shares is None else self.shares.align
        for stage in stages(self.training.recipe.alignment.schedule, len(self.hybrid.parts), steps):
            self.training.journal.piece(f"stage {stage.number + 1}", partial(self._run_stage, stage), self)

    def _share(self) -> None:
        """Of a budget of time."""
        if self.training.recipe.seconds is not None:
            self.unshare()
            self.training.journal.piece("shares", self._found, self)

    def _found(self) -> None:
        self.shares = shared(self.hybrid, self.training, self.solving)
        self.notes.append(self.shares.told)

    def unshare(self) -> None:
        """The hybrid is about to be trained."""
        unshare(self.hybrid.graph_module, self.training.guide)
        self.unshared = True

    def _solve_all(self) -> None:
        solver, observer, parts = self.solver(0, preparing=True), self.training.observer, self.hybrid.parts
        for number, part in enumerate(parts):
            k = len(self.snapshots)
            observer.begin("solve", part, number + 1, len(parts), 0)
            self.begins([k])
            solver.solve(k)
            self.snapshot(k + 1, None)
            observer.end({"divergence": self.snapshots[-1].evaluation.divergence})
            if not self.passes(number) and part != parts[-1]:
                solver = self.solver(len(self.snapshots), preparing=True)

    def _prepare(self) -> None:
        """All that comes before stages; those one after the other solve their part on what the ones before became."""
        parts = range(len(self.hybrid.parts))
        prepare(self.training.guide, self.hybrid, self.solving)
        self.begins(parts)
        if self.training.recipe.alignment.schedule in ("joint", "independent"):
            self.solve(parts)

    def _run_stage(self, stage: Stage) -> None:
        if self.training.recipe.alignment.schedule in ("progressive", "sequential"):
            k = len(self.snapshots)
            self.inner("first", partial(self._one_part, moved(stage, k), k))
            self.passes(stage.number)
        else:
            self._all_at_once(stage)

    def _one_part(self, stage: Stage, k: int) -> None:
        self.solve([k])
        self.snapshot(k + 1, self._trained(stage))

    def _all_at_once(self, stage: Stage) -> None:
        self.inner("first", partial(self._train_all, stage))
        result = self.results[-1]
        for number in range(len(self.hybrid.parts)):
            k = len(self.snapshots)
            self.snapshot(k + 1, result)
            if not self.passes(number):
                # what comes after was solved on what this part gave
                self.solve(range(len(self.snapshots), len(self.hybrid.parts)))
                self.partials.forget()

    def _train_all(self, stage: Stage) -> None:
        solved = Best([self.hybrid.module(r) for r in self.hybrid.replacements])
        solved.offer(self.value())
        self._trained(stage)
        if math.isfinite(solved.value):
            if not solved.offer(self.value()):
                self.notes.append("alignment did not help: kept what the closed form gave")
            solved.restore()

    def _trained(self, stage: Stage) -> StageResult:
        result = Aligner(self.hybrid, self.training, self.solving).run(stage)
        self.results.append(result)
        self.partials.forget()
        return result

    def inner(self, name: str, compute: Callable[[], None]) -> None:
        """What another piece may follow in the same stage."""
        compute()

    def begins(self, parts: Iterable[int]) -> None:
        """Before these parts are solved for the first time."""

    def passes(self, number: int) -> bool:
        """Whether the part of the last snapshot, the plan's part `number`, stands as it was made; else it is another by
        now, or none.
        """
        return True

    def value(self) -> float:
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
            "results": [asdict(result) for result in self.results],
            "notes": list(self.notes),
            "shares": None if self.shares is None else self.shares.to_dict(),
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
        self.results = [StageResult.from_dict(result) for result in state["results"]]
        self.notes = list(state["notes"])
        self.shares = None if state["shares"] is None else Shares.from_dict(state["shares"])

    @cached_property
    def partials(self) -> Partials:
        return Partials(self.training.guide, self.hybrid, self._judged)

    def solver(self, first: int, preparing: bool) -> Solver:
        """Of all parts from this one on, in their order."""
        form = self.training.recipe.closed_form
        return Solver(
            self.training.guide,
            self.hybrid,
            range(first, len(self.hybrid.parts)),
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
        judge = self.judge
        if not self._apart:
            partial = with_state(self.bound_plan, parts, state)
            return judge.of(lambda number: partial.graph_module(**self._judged[number]), range(len(self._judged)))
        with evaluating(self.hybrid.graph_module):
            return judge.of(lambda number: self.partials.output(parts, number), range(len(self._judged)))


def moved(stage: Stage, part: int) -> Stage:
    """The stage where its last part is this one: parts before it may be the guide's again."""
    parts = tuple(range(part + 1)) if len(stage.trained) > 1 else (part,)
    return replace(stage, trained=parts, compared=parts)


def prepare(guide: fx.GraphModule, hybrid: Hybrid, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Show the guide's activations to the modules that choose by them, part after part to hold few at a time."""
    parts = range(len(hybrid.parts))
    solver = Solver(guide, hybrid, parts, batches, ridge=None, preparing=True)
    for part in parts:
        solver.solve(part)
