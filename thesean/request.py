"""What a run begins with: the arguments of `compile`, `baseline` and `plan`, bound to the graph and the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thesean.choose.choose_plan import choose_plan
from thesean.choose.constraints import Constraints, parse_constraints
from thesean.choose.search import UNMET
from thesean.distill.data import Feed, example_inputs_of, integer_labels, make_feed
from thesean.distill.observer import Observer
from thesean.distill.task import Loss, Metric, Task, output_kind
from thesean.errors import PlanError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.signature import output_wrapper
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.make_plan import TargetSpec, bind_plan, make_plan
from thesean.passes.plan.partition import Granularity
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe
from thesean.targets import Target


@dataclass(frozen=True, kw_only=True)
class Given:
    """The user's data and task."""

    data: Iterable[Any] | None
    example_inputs: Any
    loss: Loss | None = None
    metric: Metric | None = None
    eval_data: Iterable[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which parts, and what they become."""

    target: TargetSpec
    parts: Sequence[str] | None
    keep: Sequence[str]
    granularity: Granularity | None
    merge: int | None
    target_parts: int | None
    constraints: Constraints | Mapping[str, Any] | None
    candidates: Sequence[str | Target] | None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        """Raises PlanError for what no plan can be made of."""
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise PlanError(f"plan: expected a Plan or the path of one in YAML, found {type(self.plan).__name__}.")
        for name in ("parts", "keep", "candidates"):
            given = getattr(self, name)
            if given is None or isinstance(given, (str, Target)):
                continue
            kinds = (str, Target) if name == "candidates" else (str,)
            if not isinstance(given, Iterable) or not all(isinstance(v, kinds) for v in given):
                what = "names or Targets" if name == "candidates" else "globs over module paths"
                raise PlanError(f"{name}: expected {what}, found {given!r}.")
        for name in ("merge", "target_parts"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise PlanError(f"{name}: expected a whole number, found {number!r}.")
        more = ("parts", "keep", "granularity", "merge", "target_parts", "constraints", "candidates")
        given_twice = [name for name in more if getattr(self, name)] + (["target"] if self.target != "rnn" else [])
        if self.plan is not None and given_twice:
            raise PlanError(
                f"plan= says what replaces which part: leave {', '.join(given_twice)} out, or edit the plan."
            )

    @property
    def is_auto(self) -> bool:
        return self.plan is None and self.target == "auto"


@dataclass(frozen=True, kw_only=True)
class Run:
    bound_plan: BoundPlan
    task: Task
    recipe: Recipe
    feed: Feed
    notes: list[str]


def set_up(model: nn.Module, given: Given, wanted: Wanted, settings: Recipe, seed: int, observer: Observer) -> Run:
    """Everything before the conversion itself: cheap, so that a wrong argument fails at once, unless "auto" has to
    find a plan first.
    """
    notes: list[str] = []
    if wanted.is_auto:
        chosen, captured, feed, task = choose_for(model, given, wanted, settings, seed, observer, notes)
        for note in chosen.notes:
            if note.startswith(UNMET):
                warnings.warn(note, UserWarning, stacklevel=3)
                notes.append(note)
        if not chosen.replaced:
            raise PlanError(f"the guide itself meets the constraints ({wanted.constraints}): nothing to convert.")
        bound_plan = bind_plan(captured, chosen)
    else:
        captured = capture(model, example_inputs_of(model, given.data, given.example_inputs))
        bound_plan = draft_for(captured, wanted)
        feed, task = _feed_and_task(captured, given, seed, notes)
    return Run(bound_plan=bound_plan, task=task, recipe=settings, feed=feed, notes=notes)


def choose_for(
    model: nn.Module,
    given: Given,
    wanted: Wanted,
    settings: Recipe,
    seed: int,
    observer: Observer,
    notes: list[str] | None = None,
) -> tuple[Plan, Captured, Feed, Task]:
    """What target "auto" finds, and what it was found with."""
    bounds = parse_constraints(wanted.constraints)
    captured = capture(model, example_inputs_of(model, given.data, given.example_inputs))
    feed, task = _feed_and_task(captured, given, seed, notes if notes is not None else [])
    chosen = choose_plan(
        captured,
        bounds,
        wanted.candidates,
        parts=wanted.parts,
        keep=wanted.keep,
        granularity=wanted.granularity or "sublayer",
        merge=wanted.merge,
        target_parts=wanted.target_parts,
        task=task,
        feed=feed,
        recipe=settings,
        seed=seed,
        observer=observer,
    )
    return chosen, captured, feed, task


def _feed_and_task(captured: Captured, given: Given, seed: int, notes: list[str]) -> tuple[Feed, Task]:
    feed = make_feed(captured, given.data, given.eval_data, given.example_inputs, seed, notes)
    task = Task(
        loss=given.loss,
        metric=given.metric,
        kind=output_kind(_guide_output(captured), integer_labels(feed.first)),
        wrap=output_wrapper(captured.signature.output_class),
    )
    return feed, task


def draft_for(captured: Captured, wanted: Wanted) -> BoundPlan:
    if wanted.plan is not None:
        return bind_plan(captured, wanted.plan)
    if wanted.constraints is not None or wanted.candidates is not None:
        raise PlanError("constraints= and candidates= belong to target='auto', which chooses among candidates.")
    return make_plan(
        captured,
        wanted.target,
        keep=wanted.keep,
        granularity=wanted.granularity or "block",
        parts=wanted.parts,
        merge=wanted.merge,
        target_parts=wanted.target_parts,
    )


@torch.no_grad()
def _guide_output(captured: Captured) -> Any:
    return captured.graph_module(**captured.example)
