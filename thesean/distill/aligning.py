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

from thesean import ranks
from thesean.distill.align import Aligner, Stage, StageResult, stages
from thesean.distill.best import Best
from thesean.distill.budget import RunStage, Shares, shared, shared_steps, tries
from thesean.distill.check_alignment import check_names, check_places, check_samples
from thesean.distill.closed_form import Solver, solve_parts, solver_by
from thesean.distill.enough import enough
from thesean.distill.evaluate import Evaluation, Judge
from thesean.distill.objective import Objective, told_of_batches
from thesean.distill.partial import Partials, stand_apart
from thesean.distill.recalibrate import batch_norms
from thesean.distill.snapshot import Snapshot, State, with_state
from thesean.distill.training import Training
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import unshare
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, Replacement, view_of

# Stages are judged on so many held-out batches, or on more where that costs no more than solving does. To judge each of
# n stages runs what is left of the guide, n / 2 forwards a batch: past so many stages fewer batches are taken, or some
# rows of one where that is still more than half of what is solved on, so that the cost of all grows with the layers and
# not by their square.
_JUDGED_BATCHES, _STAGES = 4, 8


class Aligning:
    """One alignment under way: what feeds the closed form, and the snapshots so far."""

    def __init__(self, bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> None:
        self.training = training
        taken, told = enough(training, hybrid, bound_plan.captured.signature)
        self.solving = training.inputs(taken)
        self.snapshots: list[Snapshot] = []
        self.results: list[StageResult] = []  # of all that was trained, kept or not
        self.notes: list[str] = [told] if told else []
        self._start = time.monotonic()
        check_names(training.recipe.alignment, [p.planned.path for p in bound_plan.parts])
        self.order = list(range(len(hybrid.parts)))  # in which parts come
        if training.recipe.alignment.order == "back-to-front":
            self.order.reverse()
        self.take(bound_plan, hybrid)
        if self.staged:
            check_places(training.recipe.alignment, len(hybrid.parts))
            check_samples(training, hybrid, taken)
        self.shares: Shares | None = None
        self.unshared = False  # whether the hybrid may be trained
        self.settling = 0.0  # seconds that all parts take to be solved at once, where they were
        held_out = training.judge.batches
        count = len(hybrid.parts)
        most = max(1, _JUDGED_BATCHES * max(min(count, _STAGES), len(self.solving)) // max(1, count))
        self._judged = [inputs for _, inputs in held_out[:most]]
        self.judge = training.judge
        self.judged_on = ""
        if len(self._judged) < len(held_out):
            self.judged_on = f"stages were judged on the first {len(self._judged)} of {len(held_out)} held-out batches"
        if count > _STAGES and len(self._judged) == 1:
            self._judge_rows(bound_plan.captured.signature, [inputs for _, inputs in taken])

    def take(self, bound_plan: BoundPlan, hybrid: Hybrid) -> None:
        """Go on with this hybrid."""
        self.bound_plan, self.hybrid = bound_plan, hybrid
        self._latest: dict[str, tuple[list[int], dict[str, torch.Tensor]]] = {}
        # taken before anything is solved: in between, what stays would leave holes where the rest was
        self._room = {r.name: deepcopy(hybrid.module(r).state_dict()) for r in hybrid.replacements}
        self._apart = stand_apart(bound_plan, hybrid)
        self.__dict__.pop("partials", None)

    def _judge_rows(self, signature: Signature, solving: Sequence[dict[str, torch.Tensor]]) -> None:
        """Where one batch is too many: some of its rows, by the divergence alone, for a loss reads whole batches."""
        _, judged = self.training.feed.held_out[0]
        sizes = [signature.check(inputs).get("batch", 1) for inputs in (*solving, judged)]
        rows = max(ranks.count(), sum(sizes[:-1]) // len(self.hybrid.parts))
        if rows < sizes[-1]:
            few = signature.first_rows(judged, rows)
            task = replace(self.training.task, loss=None, metric=None)
            self.judge = Judge(self.training.guide, task, [(few, few)])
            if (known := self.training.judge.known_rows(0, rows)) is not None:
                self.judge.learn(0, known)
            self._judged = [inputs for _, inputs in self.judge.batches]
            self.judged_on = (
                f"stages were judged by the divergence on {rows} of the {sizes[-1]} rows of a held-out batch"
            )

    @property
    def judged(self) -> range:
        """The numbers of the batches that stages are judged on."""
        return range(len(self._judged))

    @property
    def staged(self) -> bool:
        """Whether there is more than a closed form of all parts as they stand."""
        alignment = self.training.recipe.alignment
        takes_steps = round(self.training.recipe.steps * alignment.usual) > 0
        return alignment.schedule != "none" and (takes_steps or alignment.order != "front-to-back")

    def run(self) -> None:
        if not self.staged:
            self._solve_all()
            self._share()
            return
        self.unshare()
        self.notes += told_of_batches(self.training.recipe)
        self.training.journal.piece("solve", self._prepare, self)
        self._share()
        steps = round(self.training.recipe.steps * self.training.recipe.alignment.usual)
        if self.shares is not None:
            steps = self.shares.align
            if self.shares.aligned is not None:
                self.hybrid.graph_module.load_state_dict(self.shares.aligned)
                self.partials.forget()
        for stage in stages(self.training.recipe.alignment.schedule, len(self.hybrid.parts), steps):
            self.training.journal.piece(f"stage {stage.number + 1}", partial(self._run_stage, stage), self)

    def _share(self) -> None:
        """Where trials tell how."""
        timed = self.training.recipe.seconds is not None
        if timed or tries(self.hybrid, self.training):
            self.unshare()
            by = partial(shared, settling=self.settling) if timed else shared_steps
            self.training.journal.piece("shares", partial(self._found, by), self)

    def _found(self, by: Callable[[Hybrid, Training, RunStage], Shares]) -> None:
        self.shares = by(self.hybrid, self.training, self._tried)
        self.notes.append(self.shares.told)

    def _tried(self, stage: Stage, training: Training) -> StageResult:
        taken = self.order[: stage.number + 1]
        if not self.training.recipe.alignment.at_once:
            stage = moved(stage, taken)
        return Aligner(self.standing(stage.standing), training, self.solving).run(stage)

    def unshare(self) -> None:
        """The hybrid is about to be trained."""
        unshare(self.hybrid.graph_module, self.training.guide)
        self.unshared = True

    def _solve_all(self) -> None:
        solver, observer, parts = self.solver(0, preparing=True), self.training.observer, self.hybrid.parts
        phase = "solve" if self.training.recipe.closed_form.enabled else "judge"
        for number, part in enumerate(parts):
            k = len(self.snapshots)
            observer.begin(phase, part, number + 1, len(parts), 0)
            self.begins([k])
            solver.solve(k)
            self.snapshot(self.order[: k + 1], None)
            observer.end({"divergence": self.snapshots[-1].evaluation.divergence})
            if not self.passes(number) and part != parts[-1]:
                solver = self.solver(len(self.snapshots), preparing=True)

    def _prepare(self) -> None:
        """All that comes before stages; those one after the other solve their part on what the ones before became."""
        parts = range(len(self.hybrid.parts))
        prepare(self.training.guide, self.hybrid, self.solving)
        self.begins(parts)
        if self.training.recipe.alignment.recalibrate and not any(batch_norms(self.hybrid, k) for k in parts):
            self.notes.append("no part has a batch norm that could be recalibrated")
        if self.training.recipe.alignment.at_once:
            begun = time.monotonic()
            self.solve(self.hybrid, parts)
            if self.training.recipe.alignment.refits:
                (self.settling,) = ranks.agreed(time.monotonic() - begun)
        elif self.training.recipe.alignment.order == "easiest-first":
            self._find_order()

    def _find_order(self) -> None:
        """By how far the guide with one part replaced is from the guide. Leaves the parts as they were."""
        apart: list[float] = []
        for k, part in enumerate(self.hybrid.parts):
            self.training.observer.begin("order", part, k + 1, len(self.hybrid.parts), 0)
            before = [deepcopy(self.hybrid.module(r).state_dict()) for r in self.hybrid.of_part(k)]
            view = view_of(self.bound_plan, self.hybrid, [k])
            self.solve(view, [k])
            apart.append(self._judge_hybrid(view).divergence)
            for r, state in zip(self.hybrid.of_part(k), before, strict=True):
                self.hybrid.module(r).load_state_dict(state)
            self.training.observer.end({"divergence": apart[-1]})
        self.order = sorted(range(len(apart)), key=lambda k: apart[k] if math.isfinite(apart[k]) else math.inf)
        how = "in closed form" if self.training.recipe.closed_form.enabled else "as it begins"
        told = ", ".join(f"{self.hybrid.parts[k]} {apart[k]:.4g}" for k in self.order)
        self.notes.append(f"easiest first, by the divergence of the guide with this part alone replaced, {how}: {told}")

    def _run_stage(self, stage: Stage) -> None:
        if self.training.recipe.alignment.at_once:
            self._all_at_once(stage)
        else:
            self.inner("first", partial(self._one_part, stage, self.order[: len(self.snapshots) + 1]))
            self.passes(stage.number)

    def _one_part(self, stage: Stage, taken: list[int]) -> None:
        standing = self.standing(taken)
        self.solve(standing, taken[-1:])
        solved = Best([self.hybrid.module(r) for r in self.hybrid.replacements])
        if stage.steps and self.training.recipe.closed_form.enabled:
            solved.offer(self._value(taken))
        result = self._trained(moved(stage, taken), standing)
        if result.steps and math.isfinite(solved.value) and self._value(taken) > solved.value:
            solved.restore()
            self.partials.forget()
            result = replace(result, after=result.before, curve=replace(result.curve, kept=0))
            self.results[-1] = result
            self.notes.append(f"{self.hybrid.parts[taken[-1]]}: alignment did not help: kept what the closed form gave")
        self.snapshot(taken, result)

    def _value(self, parts: Sequence[int]) -> float:
        """As stages are judged, of the hybrid in which these parts stand as they are now, lower is better."""
        modules = {r.name: self.hybrid.module(r).state_dict() for r in self.hybrid.replacements if r.part in parts}
        return self._evaluate(parts, modules).value

    def _all_at_once(self, stage: Stage) -> None:
        self.inner("first", partial(self._train_all, stage))
        result = self.results[-1]
        for number in range(len(self.hybrid.parts)):
            self.snapshot(self.order[: len(self.snapshots) + 1], result)
            if not self.passes(number):
                # what comes after was solved on what this part gave
                self.solve(self.hybrid, range(len(self.snapshots), len(self.hybrid.parts)))
                self.partials.forget()

    def _train_all(self, stage: Stage) -> None:
        solved = Best([self.hybrid.module(r) for r in self.hybrid.replacements])
        solved.offer(self.value())
        result = self._trained(stage, self.hybrid)
        if math.isfinite(solved.value):
            if not solved.offer(self.value()) and result.steps:
                self.notes.append("alignment did not help: kept what the closed form gave")
            solved.restore()

    def _trained(self, stage: Stage, standing: Hybrid) -> StageResult:
        return self.add(Aligner(standing, self.training, self.solving).run(stage))

    def add(self, result: StageResult) -> StageResult:
        self.results.append(result)
        self.notes += result.notes
        self.partials.forget()
        return result

    def standing(self, parts: Sequence[int], training: Training | None = None) -> Hybrid:
        """In which a stage trains once these parts are replaced: the whole hybrid where they are all of its parts, or
        the first ones and nothing looks past them; else the guide with these parts of the hybrid.
        """
        count = len(self.hybrid.parts)
        sees = Objective(training or self.training, self.hybrid.parts).whole
        if len(parts) == count or (not sees and sorted(parts) == list(range(len(parts)))):
            return self.hybrid
        return view_of(self.bound_plan, self.hybrid, parts)

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
        return self.training.judge.value(self.hybrid.graph_module)

    def state_dict(self) -> dict[str, Any]:
        """Modules, and what stages left behind."""
        return {
            "modules": {r.name: self.hybrid.module(r).state_dict() for r in self.hybrid.replacements},
            "order": list(self.order),
            "snapshots": [
                {
                    "parts": s.parts,
                    "state": s.state,
                    "evaluation": asdict(s.evaluation),
                    "result": None if s.result is None else asdict(s.result),
                    "seconds": s.seconds,
                }
                for s in self.snapshots
            ],
            "results": [asdict(result) for result in self.results],
            "notes": list(self.notes),
            "settling": self.settling,
            "shares": None if self.shares is None else self.shares.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for r in self.hybrid.replacements:
            self.hybrid.module(r).load_state_dict(state["modules"][r.name])
        self.order = list(state["order"])
        self.snapshots = [
            Snapshot(
                parts=s["parts"],
                state=s["state"],
                evaluation=Evaluation(**s["evaluation"]),
                result=None if s["result"] is None else StageResult.from_dict(s["result"]),
                seconds=s["seconds"],
            )
            for s in state["snapshots"]
        ]
        self.results = [StageResult.from_dict(result) for result in state["results"]]
        self.notes, self.settling = list(state["notes"]), state["settling"]
        self.shares = None if state["shares"] is None else Shares.from_dict(state["shares"])

    @cached_property
    def partials(self) -> Partials:
        return Partials(self.training.guide, self.hybrid, self._judged)

    def solver(self, first: int, preparing: bool) -> Solver:
        """Of all parts from this one on, in their order."""
        parts, form = range(first, len(self.hybrid.parts)), self.training.recipe.closed_form
        return solver_by(form, self.training.guide, self.hybrid, parts, self.solving, preparing)

    def solve(self, hybrid: Hybrid, parts: Sequence[int]) -> None:
        form = self.training.recipe.closed_form
        if form.enabled:
            ridge, copied = form.ridge, form.solve_copied
            solve_parts(self.training.guide, hybrid, parts, self.solving, ridge=ridge, solve_copied=copied)

    def snapshot(self, parts: Sequence[int], result: StageResult | None) -> None:
        """Of the hybrid in which these parts are replaced, the newest one last."""
        state = {r.name: self._state_of(r) for r in self.hybrid.replacements if r.part in parts}
        self.snapshots.append(
            Snapshot(
                parts=tuple(parts),
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

    def _evaluate(self, parts: Sequence[int], state: State) -> Evaluation:
        """The hybrid with these parts as they are now, and the guide's elsewhere."""
        if not self._apart or self.order != sorted(self.order):
            return self._judge_hybrid(with_state(self.bound_plan, parts, state))
        with evaluating(self.hybrid.graph_module):
            return self.judge.of(lambda number: self.partials.output(len(parts), number), self.judged)

    def _judge_hybrid(self, hybrid: Hybrid) -> Evaluation:
        """As stages are judged."""
        with evaluating(hybrid.graph_module):
            return self.judge.of(lambda number: hybrid.graph_module(**self._judged[number]), self.judged)


def moved(stage: Stage, taken: Sequence[int]) -> Stage:
    """The stage where these parts stand, the last one new: not all may have come that were to, nor in this order."""
    parts = tuple(taken) if len(stage.trained) > 1 else (taken[-1],)
    return replace(stage, trained=parts, compared=parts, replaced=tuple(taken))


def prepare(guide: fx.GraphModule, hybrid: Hybrid, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Show the guide's activations to the modules that choose by them, part after part to hold few at a time."""
    parts = range(len(hybrid.parts))
    solver = Solver(guide, hybrid, parts, batches, ridge=None, preparing=True)
    for part in parts:
        solver.solve(part)
