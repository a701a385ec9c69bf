"""End-to-end training of the converted network: task loss, annealed distillation, annealed hidden states.

loss = (1 - w) task(output) + w KL_T(guide | output) + h sum_k nmse(exit_k), w and h falling linearly to 0 at
`anneal_until` of the steps: a strong target is not held near a weak guide. Without a task loss, w stays 1.

What it leaves is the state that did best on held-out data, which may be the one it began with. A rate that suits a
network that is far from its guide drives one that is near away from it, so the rate is found from the start at hand:
by short runs, each with a whole schedule of its own, up and down a ladder of rates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from thesean.curve import Curve, Tracing
from thesean.distill.align import examples, faint
from thesean.distill.best import Best
from thesean.distill.seen import Seen, rows
from thesean.distill.stream import Stream
from thesean.distill.task import Batch, Task
from thesean.distill.training import Training
from thesean.errors import DataError, NumericalError
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.hybrid import Hybrid
from thesean.recipe import RATES
from thesean.similarity import get_measure

# Held-out batches that choose among states, and how often in a run; all of them decide whether it helped at all.
_CHECK_BATCHES, _CHECKS, _LEAST_BETWEEN = 4, 20, 5

# A short run takes this share of the steps, within these bounds. Where so few steps are asked for that short runs would
# be most of them, the rate is a gentle one.
_TRIAL, _TRIAL_SHARE, _TRIAL_STEPS, _WORTH_TRYING, _GENTLE = "find rate", 0.06, (10, 40), 80, 3e-4

# A short run favours low rates, as high ones pay late: the long run takes the next higher one. Where that is no better
# than the very start after this share of the steps, it goes back to where it began, and on with the one that was found.
_GIVES_UP_AT = 0.3

LossOf = Callable[[int, Batch], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The steps taken, short runs included, the curves of all of them, and what to tell."""

    steps: int
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()


def fine_tune(hybrid: Hybrid, training: Training, steps: int, phase: str = "fine-tune") -> Tuned:
    """Train all of the hybrid's parameters for `steps`; leaves it in eval mode, in the best state that was seen."""
    hybrid.graph_module.eval()
    if not steps or not any(p.requires_grad for p in hybrid.graph_module.parameters()):
        return Tuned(steps=0)
    return _Tuner(hybrid, training, steps, phase).run()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of the optimizer, checked on held-out data `every` so many steps. One that isn't below `bound` after
    `patience` steps ends there.
    """

    phase: str
    rate: float
    steps: int
    every: int
    patience: int | None = None
    bound: float = float("inf")


class _Tuner:
    """One fine-tuning: its loss, and what it did so far."""

    def __init__(self, hybrid: Hybrid, training: Training, steps: int, phase: str) -> None:
        self.graph_module, self.training, self.steps, self.phase = hybrid.graph_module, training, steps, phase
        self.loss_of = _loss_of(hybrid, training, steps)
        self.best = Best([self.graph_module])  # by some held-out batches
        self.curves: list[Curve] = []
        self.taken = 0

    def run(self) -> Tuned:
        start = Best([self.graph_module])  # by all of them
        start.offer(self._value())
        self.best.offer(self.check())
        begun = self.best.value
        rate = self.training.recipe.fine_tuning.learning_rate
        if rate != "find":
            self._run(rate)
        elif self.steps < _WORTH_TRYING:
            self._run(_GENTLE)
        else:
            found = self._found(start)
            if found + 1 < len(RATES):
                self._run(RATES[found + 1], gives_up_above=begun)
            self._run(RATES[found])
        self.best.restore()
        helped = start.offer(self._value())
        start.restore()
        told = () if helped else (f"{self.phase} did not help: kept the state that it began with",)
        return Tuned(steps=self.taken, curves=tuple(self.curves), notes=told)

    def _run(self, rate: float, gives_up_above: float | None = None) -> None:
        """The steps that are left, or some of them where it gives up."""
        left = self.steps - self.taken
        if left:
            run = _Run(
                phase=self.phase,
                rate=rate,
                steps=left,
                every=max(_LEAST_BETWEEN, -(-left // _CHECKS)),
                patience=None if gives_up_above is None else max(1, round(_GIVES_UP_AT * left)),
                bound=float("inf") if gives_up_above is None else gives_up_above,
            )
            self._train(run, self.training.feed.stream, self.best.value)
            self.best.restore()

    def _found(self, start: Best) -> int:
        """The place in RATES of the one whose short run gains most. Leaves the network in the best state.

        All of them see the same batches. From the middle of the ladder it goes one up, or down as long as that gains.
        """
        least, most = _TRIAL_STEPS
        steps = min(most, max(least, round(_TRIAL_SHARE * self.steps)))
        batches = list(itertools.islice(self.training.feed.stream, steps))
        before = self.best.value
        ends: dict[int, float] = {}

        def end(at: int) -> float:
            if at not in ends:
                start.restore()
                run = _Run(phase=_TRIAL, rate=RATES[at], steps=steps, every=steps)
                ends[at] = self._train(run, Stream(batches), before)
            return ends[at]

        at = len(RATES) // 2
        if end(at + 1) < end(at):
            at += 1  # the next higher one is what the long run takes: no short run of it is needed
        else:
            while at > 0 and end(at - 1) < end(at):
                at -= 1
        self.best.restore()
        return at

    def _train(self, run: _Run, batches: Stream, before: float) -> float:
        """The held-out value at the end, which was `before`; infinite where a rate that is only tried leads to none."""
        return self.training.journal.piece(
            f"{run.phase} {len(self.curves) + 1}", partial(self._trained, run, batches, before), self
        )

    def _trained(self, run: _Run, batches: Stream, before: float) -> float:
        settings, observer, begun = self.training.recipe.fine_tuning, self.training.observer, self.taken
        watch = _Watch(self, run, batches, before)
        observer.begin(run.phase, f"{run.rate:g}" if run.phase == _TRIAL else None, 1, 1, run.steps)
        self.graph_module.train()
        try:
            self.training.trainer.train(
                [p for p in self.graph_module.parameters() if p.requires_grad],  # what the guide froze stays frozen
                lambda step, batch: self.loss_of(begun + step, batch),
                batches,
                steps=run.steps,
                learning_rate=run.rate,
                weight_decay=settings.weight_decay,
                where="fine-tuning",
                after=watch,
            )
        except NumericalError:
            if run.phase != _TRIAL and run.patience is None:
                raise
            watch.value = float("inf")
        self.graph_module.eval()
        self.curves.append(watch.trace.done(watch.kept))
        observer.end({"held out": watch.value})
        return watch.value

    def state_dict(self) -> dict[str, Any]:
        """Between two runs; the weights are those of the best state, or will be put back to the start's."""
        return {"best": self.best.state_dict(), "taken": self.taken, "curves": [asdict(c) for c in self.curves]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.taken, self.curves = state["taken"], [Curve.from_dict(c) for c in state["curves"]]

    def check(self) -> float:
        """On the batches that choose among states."""
        return self._value(_CHECK_BATCHES)

    @torch.no_grad()
    def _value(self, count: int | None = None) -> float:
        """On the first held-out batches, all by default."""
        self.graph_module.eval()
        judge = self.training.judge
        return judge.of(lambda number: self.graph_module(**judge.batches[number][1]), count).value


class _Watch:
    """Looks at a run on held-out data now and then, and keeps the best state."""

    def __init__(self, tuner: _Tuner, run: _Run, batches: Stream, before: float) -> None:
        self.tuner, self.run, self.batches = tuner, run, batches
        self.trace = Tracing(run.phase, None, run.rate, held_out=[(0, before)])
        self.kept, self.value = 0, float("inf")

    def __call__(self, step: int, loss: float) -> bool:
        tuner, run = self.tuner, self.run
        tuner.taken += 1
        self.trace.losses.append(loss)
        if step % run.every == 0 or step in (run.steps, run.patience):
            self.value = tuner.check()
            self.trace.held_out.append((step, self.value))
            self.kept = step if tuner.best.offer(self.value) else self.kept
            tuner.graph_module.train()
        return step == run.patience and not self.value < run.bound

    def state_dict(self) -> dict[str, Any]:
        graph_module, tuner = self.tuner.graph_module.state_dict(), self.tuner.state_dict()
        watch = {"trace": self.trace.state_dict(), "kept": self.kept, "value": self.value}
        return {"graph_module": graph_module, "tuner": tuner, "watch": watch, "batches": self.batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuner.graph_module.load_state_dict(state["graph_module"])
        self.tuner.load_state_dict(state["tuner"])
        self.batches.load_state_dict(state["batches"])
        self.trace.load_state_dict(state["watch"]["trace"])
        self.kept, self.value = state["watch"]["kept"], state["watch"]["value"]


def _loss_of(hybrid: Hybrid, training: Training, steps: int) -> LossOf:
    """The loss of a step's batch, out of `steps`."""
    task, settings = training.task, training.recipe.fine_tuning
    nmse = get_measure("nmse")
    own_names = [own for own, _ in hybrid.boundaries]
    guide_names = [theirs for _, theirs in hybrid.boundaries]
    use_hidden = settings.hidden > 0
    use_guide = settings.distillation > 0 or use_hidden or task.loss is None
    seen = Seen(training.guide)
    own = intermediates(hybrid.graph_module, own_names if use_hidden else [])
    theirs = intermediates(training.guide, [*(guide_names if use_hidden else []), *seen.names])

    def loss_of(step: int, batch: Batch) -> torch.Tensor:
        whole, inputs = batch
        got = own(**inputs)
        left = max(0.0, 1 - step / (steps * settings.anneal_until))
        weight = settings.distillation * left if task.loss is not None else 1.0
        hidden = settings.hidden * left
        terms: list[Any] = []
        if task.loss is not None and weight < 1:
            terms.append((1 - weight) * _task_loss(task, got["output"], whole))
        if use_guide and (weight > 0 or hidden > 0):
            with torch.no_grad():
                wanted = theirs(**inputs)
            if weight > 0:
                masks = seen.of_outputs(wanted)
                off = task.outputs.distance(got["output"], wanted["output"], settings.temperature, masks)
                terms.append(weight * off)
            if hidden > 0:
                for y, g in zip(own_names, guide_names, strict=True):
                    mask_BT = seen.of(g, wanted)
                    if not faint(rows(wanted[g], mask_BT)):
                        pair = (examples(rows(z, mask_BT)) for z in (got[y], wanted[g]))
                        terms.append(hidden * nmse.loss(*pair))
        return torch.stack([t.reshape(()) for t in terms]).sum()

    return loss_of


def _task_loss(task: Task, output: Any, batch: Any) -> torch.Tensor:
    """The user's loss; raises DataError unless it is a scalar that a gradient can flow from."""
    assert task.loss is not None
    value = task.loss(task.wrap(output), batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(
            f"loss(output, batch) returned {found}; expected a scalar tensor computed from output. "
            "Return a mean, and not .item() of it."
        )
    return value
