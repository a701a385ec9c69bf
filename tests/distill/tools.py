"""Hybrids, batches and recipes as the tests of training use them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from thesean.distill.data import Feed
from thesean.distill.outputs import Outputs
from thesean.distill.task import Batch, Task
from thesean.distill.training import Training
from thesean.journal import Journal
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.recipe import Alignment, FineTuning, Recipe


@contextmanager
def stopped_at(at: int) -> Iterator[None]:
    """Inside, a run is interrupted after so many steps of all its stages together."""
    taken, after_step = 0, Journal.after_step

    def stopped(self: Journal, step: int, *parts: Any) -> None:
        nonlocal taken
        taken += 1
        self.stopping = signal.SIGINT if taken == at else 0
        after_step(self, step, *parts)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "after_step", stopped)
        yield


class Recorder:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, str | None, int, int, int]] = []
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.ends: list[dict[str, float]] = []

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        self.phases.append((phase, part, stage, stages, steps))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self.losses.append(values["loss"])
        self.steps.append(step)

    def end(self, values: Mapping[str, float]) -> None:
        self.ends.append(dict(values))

    def close(self) -> None: ...


def task(loss: Any = None, metric: Any = None, **outputs: Any) -> Task:
    """Outputs by name and kind; without them the one output of an anonymous guide, by its normalised MSE."""
    return Task(loss=loss, metric=metric, outputs=Outputs(kinds=outputs or {"output": "mse"}), wrap=lambda o: o)


def drafted(captured: Captured, target: Any = "mlp", seed: int = 0, **settings: Any) -> tuple[BoundPlan, Hybrid]:
    bound_plan = make_plan(captured, target, **settings)
    torch.manual_seed(seed)
    return bound_plan, build_hybrid(bound_plan)


def batches_of(captured: Captured, count: int = 4, batch: int = 16, time: int = 8, seed: int = 0) -> list[Batch]:
    """(labelled batch, inputs): the batch is (input, integer labels)."""
    found: list[Batch] = []
    for k in range(count):
        sizes = {s: batch if s.startswith("batch") else time for s in captured.signature.symbols}
        inputs = captured.signature.random_inputs(sizes, seed=1000 * seed + k)
        labels = torch.randint(0, 5, (batch,), generator=torch.Generator().manual_seed(k))
        found.append(((next(iter(inputs.values())), labels), inputs))
    return found


def training(
    guide: Captured, what: Task, recipe: Recipe, *, batches: Any = None, held_out: Any = None, observer: Any = None
) -> Training:
    """On `batches_of` the guide unless told otherwise."""
    batches = batches_of(guide) if batches is None else batches
    held = batches_of(guide, 2, seed=7) if held_out is None else held_out
    feed = Feed(batches=batches, held_out=held, first=batches[0][0] if batches else None, length=None)
    return Training(guide=guide.graph_module, task=what, recipe=recipe, feed=feed, observer=observer or Recorder())


def recipe(
    steps: int = 8, schedule: Any = "progressive", share: float = 0.5, check_every: int = 2, **fine_tuning: Any
) -> Recipe:
    return Recipe(
        steps=steps,
        warmup=1,
        alignment=Alignment(schedule=schedule, share=share, check_every=check_every, patience=10, ceiling=0),
        fine_tuning=FineTuning(**fine_tuning),
    )


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return models.state_of(module)
