"""All that training a hybrid needs beside the hybrid."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx

from thesean import ranks
from thesean.distill.data import Feed
from thesean.distill.evaluate import Evaluation, Judge
from thesean.distill.gathered import Gathered
from thesean.distill.guide_cache import GuideCache, Run
from thesean.distill.task import Batch, Task, try_loss
from thesean.distill.train import Trainer
from thesean.journal import Journal
from thesean.observer import Observer
from thesean.recipe import Recipe
from thesean.warn import warn


@dataclass(frozen=True, kw_only=True)
class Training:
    """The guide, the task, how and on what it is trained, and who watches. `guide` is frozen."""

    guide: fx.GraphModule
    task: Task
    recipe: Recipe
    feed: Feed
    observer: Observer
    seed: int = 0
    journal: Journal = field(default_factory=Journal)
    begun: float = field(default_factory=time.monotonic)
    cache: GuideCache | None = None
    ends: float = math.inf  # on the monotonic clock, where that is before the budget's end

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return math.inf if self.recipe.seconds is None else self.recipe.seconds

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return ranks.agreed(self.begun + self.seconds - time.monotonic())[0]

    def within(self, seconds: float) -> Training:
        """The same, whose steps end so many seconds from now. Judges are the same one."""
        shorter = replace(self, ends=time.monotonic() + seconds)
        shorter.__dict__["judge"] = self.judge
        return shorter

    def own(self, batch: Batch) -> Batch:
        """The batch as it came, and this rank's rows of the guide's inputs."""
        return batch[0], self.gathered.own(batch[1])

    def inputs(self, batches: Iterable[Batch]) -> list[dict[str, torch.Tensor]]:
        """This rank's rows."""
        return [self.own(batch)[1] for batch in batches]

    def guided(self, run: Run, names: Sequence[str]) -> Run:
        """Values of the guide's nodes by name, from the cache where they are there; `run` computes them."""
        return run if self.cache is None or self.recipe.sharded else self.cache.runner(run, names)

    @property
    def spared(self) -> list[str]:
        """What the cache saved, as a note."""
        return [self.cache.told] if self.cache is not None and self.cache.told else []

    @cached_property
    def gathered(self) -> Gathered:
        return Gathered(self.guide)

    @cached_property
    def judge(self) -> Judge:
        """Evaluates hybrids on the held-out batches."""
        return Judge(self.guide, self.task, self.feed.held_out)

    @cached_property
    def trainer(self) -> Trainer:
        recipe = self.recipe
        return Trainer(
            observer=self.observer,
            optimizer=recipe.optimizer,
            schedule=recipe.learning_rate_schedule,
            warmup=recipe.warmup,
            clip=recipe.clip,
            precision=recipe.precision,
            journal=self.journal,
            deadline=min(self.ends, self.begun + self.seconds),
            own=self.own,
            accumulate=recipe.gradient_accumulation,
            rows=lambda batch: self.gathered.rows(batch[1]),
        )

    def try_loss(self) -> tuple[str, ...]:
        """What to tell of the user's loss, which is tried on the guide's output: see `task.try_loss`. Warns of it."""
        if self.task.loss is None:
            return ()
        (batch, inputs), output = self.judge.batches[0], self.judge.guide_output(0)
        given = self.gathered.given(self.task.loss, output)
        told = try_loss(self.task, given, batch, self.recipe.trains_by_loss, inputs)
        found = () if told is None else (told,)
        warn(found)
        return found

    def judge_guide(self) -> Evaluation:
        """Before anything is trained: raises NumericalError for a guide that returns NaN or whose loss is, and warns of
        a metric that is.
        """
        found = self.judge(self.guide)
        warn(found.told("the guide"))
        return found
