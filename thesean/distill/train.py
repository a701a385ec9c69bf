"""One optimizer loop for every phase: Adam, a warm-up and what follows it, clipping, and a stop at the first NaN."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from thesean import ranks
from thesean.distill.averaged import Averaged
from thesean.distill.course import Course
from thesean.distill.masters import Masters
from thesean.distill.sharded import masters_of
from thesean.distill.together import together
from thesean.errors import NumericalError
from thesean.journal import Journal
from thesean.observer import Observer
from thesean.recipe import Optimizer, Precision, RateSchedule

# of the peak learning rate: the cosine's last step
_FLOOR = 0.03

_OPTIMIZERS: dict[Optimizer, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor of `step` in 0..steps-1."""
    fall = _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    return constant(step, steps, warmup) * fall


def constant(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor of `step` in 0..steps-1: 1 after the warm-up, which takes a quarter of the steps at most."""
    return min(1.0, (step + 1) / max(1, min(warmup, steps // 4)))


_SCHEDULES: dict[RateSchedule, Callable[[int, int, int], float]] = {"cosine": cosine, "constant": constant}


def _whole(batch: Any) -> Any:
    return batch


def _alike(batch: Any) -> int:
    return 1


class Watch(Protocol):
    """Told of each step, and asked whether to stop. Its state is kept with a checkpoint, and put back before a run that
    was interrupted goes on.
    """

    def __call__(self, step: int, loss: float) -> bool: ...

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What all phases of a run train alike: optimizer, learning rate's course, the gradient's norm, the precision, and
    who is told.
    """

    observer: Observer
    optimizer: Optimizer = "adamw"
    schedule: RateSchedule = "cosine"
    warmup: int = 20
    clip: float = 1.0
    precision: Precision = "as-is"
    journal: Journal = field(default_factory=Journal)
    deadline: float = math.inf  # on the monotonic clock: the step under way then is the last
    own: Callable[[Any], Any] = _whole  # of a batch, what this rank computes
    accumulate: int = 1  # batches that make a step
    rows: Callable[[Any], int] = _alike  # of a batch: what it weighs among them
    masters: Callable[[Sequence[nn.Parameter]], Masters] = masters_of  # what is moved, of the weights that are trained
    average: Averaged | None = None  # of each step's weights

    @torch.enable_grad()  # a caller's no_grad should not stop training
    def train(
        self,
        parameters: Sequence[nn.Parameter],
        loss_of: Callable[[int, Any], torch.Tensor],
        batches: Iterator[Any],
        *,
        steps: int | Course,
        learning_rate: float,
        where: str,
        weight_decay: float = 0.0,
        after: Watch | None = None,
    ) -> int:
        """Minimise `loss_of(step, batch)` until `after(steps done, the last loss)` is true; returns the steps taken,
        those before an interruption too. Raises NumericalError with `where` and the step; Interrupted.
        """
        weights = [p for p in parameters if p.requires_grad]
        with closing(self.masters(weights)) as masters:
            pairs = list(zip(masters.parameters, weights, strict=True))
            matrices = [own for own, weight in pairs if weight.ndim >= 2]
            others = [own for own, weight in pairs if weight.ndim < 2]
            groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
            optimizer = _OPTIMIZERS[self.optimizer](groups)  # type: ignore[call-arg]  # the base class asks for defaults
            if self.average is not None:
                self.average.begin(masters)
            course = steps if isinstance(steps, Course) else Course(steps)
            watches = (course, *(part for part in (after, self.average) if part is not None))
            kept = (masters, masters.kept(optimizer), *watches)
            step = self.journal.resumed(*kept)
            course.resumed(step)
            while step < course.steps:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * _SCHEDULES[self.schedule](step, course.steps, self.warmup)
                value = self._gradients(masters, partial(loss_of, step), batches)
                if not math.isfinite(value):
                    raise NumericalError(
                        f"{where}: the loss is {value} at step {step}. Lower the recipe's learning_rate, or look for "
                        "NaN in the data."
                    )
                if masters.finish():
                    masters.clip(self.clip)
                    optimizer.step()
                    masters.write()
                    if self.average is not None:
                        self.average.add()
                step += 1
                self.observer.step(step, {"loss": value})
                if (after is not None and after(step, value)) or self.late:
                    break
                self.journal.after_step(step, *kept)
        return step

    def _gradients(self, masters: Masters, loss_of: Callable[[Any], torch.Tensor], batches: Iterator[Any]) -> float:
        """The loss of a step, whose gradients the masters have then; NaN or infinity as soon as one is."""
        masters.clear()
        value = 0.0
        for share, batch in self._shares(batches):
            with self._computing(masters.parameters), together():
                loss = share * loss_of(self.own(batch))
            value += ranks.agreed(loss.item())[0]
            if not math.isfinite(value):
                break
            masters.backward(loss)
        return value

    def _shares(self, batches: Iterator[Any]) -> list[tuple[float, Any]]:
        """The batches of a step, and what share of its rows each has."""
        if self.accumulate == 1:
            return [(1.0, next(batches))]
        taken = [next(batches) for _ in range(self.accumulate)]
        rows = [self.rows(batch) for batch in taken]
        return [(own / sum(rows), batch) for own, batch in zip(rows, taken, strict=True)]

    @property
    def late(self) -> bool:
        """Whether the time is up, for any rank."""
        return self.deadline < math.inf and ranks.any_of(time.monotonic() > self.deadline)

    def _computing(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        if self.precision == "as-is" or not parameters:
            return nullcontext()
        return torch.autocast(parameters[0].device.type, dtype=torch.bfloat16)
