"""End-to-end training of the converted network: task loss, annealed distillation, annealed hidden states.

loss = (1 - w) task(output) + w KL_T(guide | output) + h sum_k nmse(exit_k), w and h falling linearly to 0 at
`anneal_until` of the steps: a strong target is not held near a weak guide. They fall with what is new, and stay where
they are while examples come again: of labels that were seen there is nothing left to learn but by heart, and from the
guide there is (benchmarks/results/repeats.json). Without a task loss, w stays 1.

What it leaves is the state that did best on held-out data, which may be the one it began with. A rate that suits a
network that is far from its guide drives one that is near away from it. So a rate is tried by training at it, the
highest first: one that leads nowhere makes room for the next lower one, which goes on from the best state so far. Where
the weights gain nothing their mean over the last steps is asked too, of many steps (benchmarks/results/means.json).
Once the network is ahead of its guide on held-out data, by the task, the guide is left out of the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from thesean.curve import Curve, Tracing
from thesean.distill.averaged import Averaged, average_of
from thesean.distill.best import Best
from thesean.distill.course import Course
from thesean.distill.gathered import Gathered
from thesean.distill.objective import faint
from thesean.distill.recompute import Recomputing
from thesean.distill.seen import Seen, examples, rows
from thesean.distill.sharded import sharding, whole
from thesean.distill.task import Batch, task_loss
from thesean.distill.train import Trainer
from thesean.distill.training import Training
from thesean.errors import NumericalError
from thesean.passes.graph.intermediates import intermediates, names_of
from thesean.passes.plan.hybrid import Hybrid
from thesean.recipe import RATES
from thesean.similarity import get_measure

# How often in a run held-out batches are asked which state is the best; all of them decide whether it helped at all.
_CHECKS, _LEAST_BETWEEN = 20, 5

# A rate makes room for the next lower one once the network is no better than where the rate took it up, and had no new
# best for this share of the steps left: of few steps a small one, for they run out before a high rate has paid
# (benchmarks/results/rates.json); of many a larger one, for in the end the highest that pays is the best.
_PATIENCE, _MOST_PATIENCE, _LEAST_STEPS, _MANY = 0.05, 0.15, 3, 500

_FEW_AGAIN = 0.1  # of the batches read: not worth a word


def patience(left: int) -> int:
    """Steps without a gain that a rate is given, of so many that are left."""
    share = _PATIENCE + (_MOST_PATIENCE - _PATIENCE) * min(1.0, left / _MANY)
    return max(_LEAST_STEPS, round(share * left))


LossOf = Callable[[int, Batch], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The steps taken at all rates that were tried, the seconds that they took with what was looked at between them, a
    curve of each, and what to tell.
    """

    steps: int
    seconds: float | None = None  # None: not measured
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()


def fine_tune(
    hybrid: Hybrid,
    training: Training,
    steps: int,
    phase: str = "fine-tune",
    tried: Sequence[Curve] = (),
    ends: float = math.inf,
) -> Tuned:
    """Train all of the hybrid's parameters for `steps`; leaves it in eval mode, in the best state that was seen. Rates
    that did nothing when they were `tried`, from much the same start, are not tried again. Where it `ends`, on the
    monotonic clock, `steps` are a guess: it takes as many as fit, and leaves time to judge what came of them.
    """
    hybrid.graph_module.eval()
    if not steps or not any(p.requires_grad for p in hybrid.graph_module.parameters()):
        return Tuned(steps=0)
    return _Tuner(hybrid, training, Course(steps, ends), phase, tried).run()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of the optimizer, checked on held-out data `every` so many steps. It ends where the value isn't below
    `bound`, and had no new best for `patience` steps.
    """

    rate: float
    course: Course
    every: int
    patience: int | None = None
    bound: float = float("inf")


class _Tuner:
    """One fine-tuning: its loss, and what it did so far."""

    def __init__(
        self, hybrid: Hybrid, training: Training, course: Course, phase: str, tried: Sequence[Curve] = ()
    ) -> None:
        # what did nothing at a rate, in so many steps
        self.in_vain = {curve.learning_rate: curve.steps for curve in tried if not curve.kept}
        self.graph_module, self.training, self.phase = hybrid.graph_module, training, phase
        self.steps, self.ends = course.steps, course.ends
        self.average = partial(average_of, course.steps)  # of the first guess: a run that goes on has the same
        self.recomputing = Recomputing(training.recipe)
        self.judge = training.judge
        self.best = Best([self.graph_module])  # by the sample
        guide = -math.inf if training.task.loss is None else self.judge.value(training.guide, self.judge.sample)
        self.new_before = training.feed.stream.new
        # what is ahead of the guide has nothing to learn from its outputs
        self.loss_of = _loss_of(
            hybrid,
            training,
            lambda: self.steps,
            self.recomputing,
            lambda: not self.best.value < guide,
            lambda: self.new,
        )
        self.curves: list[Curve] = []
        self.taken, self.seconds = 0, 0.0

    def run(self) -> Tuned:
        looked = time.monotonic()
        self.best.offer(self.check())
        begun, start = self.best.value, None
        if len(self.judge.sample) < len(self.judge.batches):
            start = Best([self.graph_module])  # by everything
            start.offer(self.judge.value(self.graph_module))
        self.ends -= 2 * (time.monotonic() - looked)  # for as much at the end, and for whoever judges it then
        asked = self.training.recipe.fine_tuning.learning_rate
        rates = RATES if asked == "find" else (asked,)
        for rate in rates:
            left = self.steps - self.taken
            if not left or self._out_of_time():
                break
            if rate != rates[-1] and self.in_vain.get(rate, 0) >= patience(left):
                continue
            run = _Run(
                rate=rate,
                course=Course(left, self.ends),
                every=max(_LEAST_BETWEEN, -(-left // _CHECKS)),
                patience=None if rate == rates[-1] else patience(left),
                bound=self.best.value,
            )
            self._train(run)
            self.best.restore()
        if start is None:
            helped = self.best.value < begun
        else:
            helped = start.offer(self.judge.value(self.graph_module))
            start.restore()
        told = [] if helped else [f"{self.phase} did not help: kept the state that it began with"]
        told += [f"{self.phase}: {self.recomputing.told}"] if self.recomputing.told else []
        told += [again] if (again := self.came_again) else []
        return Tuned(steps=self.taken, seconds=self.seconds, curves=tuple(self.curves), notes=tuple(told))

    def _out_of_time(self) -> bool:
        """Whether a rate was the last one that there was time for."""
        if not self.curves or self.trainer.deadline == math.inf:
            return False
        return self.training.journal.piece(f"{self.phase} {len(self.curves)} late", lambda: self.trainer.late)

    @property
    def trainer(self) -> Trainer:
        trainer = self.training.trainer
        return replace(trainer, deadline=min(trainer.deadline, self.ends))

    def _train(self, run: _Run) -> None:
        self.training.journal.piece(f"{self.phase} {len(self.curves) + 1}", partial(self._trained, run), self)

    def _trained(self, run: _Run) -> None:
        settings, observer, begun = self.training.recipe.fine_tuning, self.training.observer, self.taken
        average = self.average()
        watch = _Watch(self, run, average)
        observer.begin(self.phase, None, 1, 1, run.course.steps)
        self.graph_module.train()
        start = time.monotonic()
        try:
            with sharding([self.training.guide, self.graph_module], self.training.recipe.sharded):
                replace(self.trainer, average=average).train(
                    [p for p in self.graph_module.parameters() if p.requires_grad],  # what the guide froze stays frozen
                    lambda step, batch: self.loss_of(begun + step, batch),
                    self.training.feed.stream,
                    steps=run.course,
                    learning_rate=run.rate,
                    weight_decay=settings.weight_decay,
                    where="fine-tuning",
                    after=watch,
                )
        except NumericalError:
            if run.patience is None or not math.isfinite(run.bound):
                raise
        self.graph_module.eval()
        self.seconds += time.monotonic() - start
        self.curves.append(watch.trace.done(watch.kept))
        observer.end({"held out": self.best.value})

    def state_dict(self) -> dict[str, Any]:
        """Between two runs: the weights are those of the best state."""
        curves = [asdict(c) for c in self.curves]
        told = {"taken": self.taken, "seconds": self.seconds, "curves": curves, "new before": self.new_before}
        course = {"steps": self.steps, "left": self.ends - time.monotonic()}
        return {"best": self.best.state_dict(), **told, **course}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.taken, self.seconds = state["taken"], state["seconds"]
        self.curves = [Curve.from_dict(c) for c in state["curves"]]
        self.new_before, self.steps, self.ends = state["new before"], state["steps"], time.monotonic() + state["left"]

    @property
    def came_again(self) -> str:
        """What to tell of examples that did, where that decided anything."""
        recipe = self.training.recipe
        settings, read = recipe.fine_tuning, self.taken * recipe.gradient_accumulation
        lets_go = settings.anneal_until is not None and settings.anneal_on == "new"
        if self.training.task.loss is None or not lets_go or not (settings.distillation or settings.hidden):
            return ""
        told = f"{self.phase}: {self.new:.0f} of {read} batches were new, so that the guide stayed in the loss longer"
        return told if self.new < (1 - _FEW_AGAIN) * read else ""

    @property
    def new(self) -> float:
        """Batches' worth of examples that hadn't come before, since it began."""
        return self.training.feed.stream.new - self.new_before

    def check(self) -> float:
        """On the batches that choose among states."""
        return self.judge.value(self.graph_module, self.judge.sample)


class _Watch:
    """Looks at a run on held-out data now and then, and keeps the best state."""

    def __init__(self, tuner: _Tuner, run: _Run, average: Averaged | None) -> None:
        self.tuner, self.run, self.average = tuner, run, average
        self.trace = Tracing(tuner.phase, None, run.rate, held_out=[(0, tuner.best.value)])
        self.kept = 0

    def __call__(self, step: int, loss: float) -> bool:
        tuner, run = self.tuner, self.run
        tuner.taken += 1
        self.trace.losses.append(loss)
        if step % run.every and step not in (run.course.steps, run.patience):
            return False
        value = self._check(step)
        if self.kept != step and self.average is not None and self.average.steps:
            with self.average.standing_in():
                value = min(value, self._check(step))
        self.trace.held_out.append((step, value))
        run.course.count(step)
        tuner.steps = tuner.taken - step + run.course.steps
        tuner.graph_module.train()
        return run.patience is not None and step - self.kept >= run.patience and not value < run.bound

    def _check(self, step: int) -> float:
        with whole():
            value = self.tuner.check()
            self.kept = step if self.tuner.best.offer(value) else self.kept
        return value

    def state_dict(self) -> dict[str, Any]:
        graph_module, tuner = self.tuner.graph_module.state_dict(), self.tuner.state_dict()
        watch = {"trace": self.trace.state_dict(), "kept": self.kept}
        return {"graph_module": graph_module, "tuner": tuner, "watch": watch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuner.graph_module.load_state_dict(state["graph_module"])
        self.tuner.load_state_dict(state["tuner"])
        self.run.course.ends = self.tuner.ends
        self.trace.load_state_dict(state["watch"]["trace"])
        self.kept = state["watch"]["kept"]


def _loss_of(
    hybrid: Hybrid,
    training: Training,
    steps: Callable[[], int],
    recomputing: Recomputing,
    taught: Callable[[], bool],
    new: Callable[[], float],
) -> LossOf:
    """The loss of a step's batch, out of `steps` as far as known; the task's alone, where there is one, once it isn't
    `taught`. `new`: batches' worth of examples so far that hadn't come before.
    """
    task, settings = training.task, training.recipe.fine_tuning
    nmse = get_measure("nmse")
    own_names = [own for own, _ in hybrid.boundaries]
    guide_names = [theirs for _, theirs in hybrid.boundaries]
    use_hidden = settings.hidden > 0
    use_guide = settings.distillation > 0 or use_hidden or task.loss is None
    seen, gathered = Seen(training.guide), Gathered(training.guide)
    own = recomputing.graph(intermediates(hybrid.graph_module, own_names if use_hidden else []), own_names)
    guide = intermediates(training.guide, [*(guide_names if use_hidden else []), *seen.names])
    theirs = training.guided(recomputing.frozen(guide, guide_names), names_of(guide))

    def remaining(step: int) -> float:
        """Of both weights, in `step`, whose batches have been read."""
        if settings.anneal_until is None:
            return 1.0
        passed = new() / training.recipe.gradient_accumulation - 1 if settings.anneal_on == "new" else step
        return min(1.0, max(0.0, 1 - passed / (steps() * settings.anneal_until)))

    def loss_of(step: int, batch: Batch) -> torch.Tensor:
        whole, inputs = batch
        got = own(**inputs)
        left = remaining(step) if taught() else 0.0
        weight = settings.distillation * left if task.loss is not None else 1.0
        hidden = settings.hidden * left
        terms: list[Any] = []
        if task.loss is not None and weight < 1:
            terms.append((1 - weight) * task_loss(task, gathered.given(task.loss, got["output"]), whole))
        if use_guide and (weight > 0 or hidden > 0):
            with torch.no_grad():
                wanted = theirs(**inputs)
            if weight > 0:
                given = (got["output"], wanted["output"], seen.of_outputs(wanted))
                mine, guides, masks = gathered.outputs(task.outputs, *given)
                off = task.outputs.distance(mine, guides, settings.temperature, masks, settings.divergence)
                terms.append(weight * off)
            if hidden > 0:
                for y, g in zip(own_names, guide_names, strict=True):
                    mask_BT = seen.of(g, wanted)
                    guide_NP = examples(rows(wanted[g], mask_BT))
                    if guide_NP.shape[0] >= nmse.min_examples and not faint(guide_NP):
                        terms.append(hidden * nmse.loss(examples(rows(got[y], mask_BT)), guide_NP))
        return torch.stack([t.reshape(()) for t in terms]).sum()

    return loss_of
