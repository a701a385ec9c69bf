"""End-to-end training of the converted network: task loss, annealed distillation, annealed hidden states.

loss = (1 - w) task(output) + w KL_T(guide | output) + h sum_k nmse(exit_k), w and h falling linearly to 0 at
`anneal_until` of the steps: a strong target is not held near a weak guide. Without a task loss, w stays 1.

What it leaves is the state that did best on held-out data, which may be the one it began with. A rate that suits a
network that is far from its guide drives one that is near away from it, so the rate is found from the start at hand:
by short runs, each with a whole schedule of its own, up and down a ladder of rates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from thesean.curve import Curve, Tracing
from thesean.distill.align import examples, faint
from thesean.distill.best import Best
from thesean.distill.seen import Seen, rows
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

# A short run favours low rates: of those that gain about as much the highest is taken.
_NEARLY = 0.8

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
        self.best.offer(self._value(_CHECK_BATCHES))
        rate = self.training.recipe.fine_tuning.learning_rate
        if rate == "find":
            rate = self._found(start) if self.steps >= _WORTH_TRYING else _GENTLE
        left = self.steps - self.taken
        self._train(
            rate,
            self.training.feed.stream,
            left,
            self.phase,
            self.best.value,
            every=max(_LEAST_BETWEEN, -(-left // _CHECKS)),
        )
        self.best.restore()
        helped = start.offer(self._value())
        start.restore()
        told = () if helped else (f"{self.phase} did not help: kept the state that it began with",)
        return Tuned(steps=self.taken, curves=tuple(self.curves), notes=told)

    def _found(self, start: Best) -> float:
        """The highest rate whose short run gains about as much as the best one. Leaves the network in the best state.

        All of them see the same batches. From the middle of the ladder it goes on to where the gains are.
        """
        least, most = _TRIAL_STEPS
        steps = min(most, max(least, round(_TRIAL_SHARE * self.steps)))
        batches = list(itertools.islice(self.training.feed.stream, steps))
        before = self.best.value
        gains: dict[int, float] = {}

        def gain(at: int) -> float:
            if at not in gains:
                start.restore()
                gains[at] = before - self._train(RATES[at], iter(batches), steps, _TRIAL, before, every=steps)
            return gains[at]

        at = len(RATES) // 2
        way = 1 if gain(at + 1) > gain(at) else -1
        while 0 <= at + way < len(RATES) and gain(at + way) > gain(at):
            at += way
        self.best.restore()
        most_gained = max(gains.values())
        if most_gained <= 0:
            return RATES[min(gains)]
        return RATES[max(at for at, gained in gains.items() if gained >= _NEARLY * most_gained)]

    def _train(self, rate: float, batches: Iterator[Batch], steps: int, phase: str, before: float, every: int) -> float:
        """The held-out value at the end, which was `before`; infinite where a short run leads to no number."""
        settings, observer, begun = self.training.recipe.fine_tuning, self.training.observer, self.taken
        trace = Tracing(phase, None, rate, held_out=[(0, before)])
        kept, value = 0, float("inf")

        def after(step: int, loss: float) -> bool:
            nonlocal kept, value
            self.taken += 1
            trace.losses.append(loss)
            if step % every == 0 or step == steps:
                value = self._value(_CHECK_BATCHES)
                trace.held_out.append((step, value))
                kept = step if self.best.offer(value) else kept
                self.graph_module.train()
            return False

        observer.begin(phase, f"{rate:g}" if phase == _TRIAL else None, 1, 1, steps)
        self.graph_module.train()
        try:
            self.training.trainer.train(
                [p for p in self.graph_module.parameters() if p.requires_grad],  # what the guide froze stays frozen
                lambda step, batch: self.loss_of(begun + step, batch),
                batches,
                steps=steps,
                learning_rate=rate,
                weight_decay=settings.weight_decay,
                where="fine-tuning",
                after=after,
            )
        except NumericalError:
            if phase != _TRIAL:
                raise
            value = float("inf")
        self.graph_module.eval()
        self.curves.append(trace.done(kept))
        observer.end({"held out": value})
        return value

    @torch.no_grad()
    def _value(self, count: int | None = None) -> float:
        """On the first held-out batches, all by default."""
        self.graph_module.eval()
        judge = self.training.judge
        return judge.of(lambda number: self.graph_module(**judge.batches[number][1]), count).value


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
