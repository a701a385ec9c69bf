"""What a part may cost. One that costs more than the recipe's `max_drop` is tried once more by a second recipe, and
kept as the guide's where that costs too much as well.

A part's cost is the rise of what stages are judged by, from the hybrid before it to the hybrid with it, on the same
held-out batches: the user's loss; where there is none, or where stages are judged by it alone, the divergence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from thesean.distill.align import Aligner, Stage
from thesean.distill.aligning import Aligning
from thesean.distill.closed_form import solver_by
from thesean.distill.training import Training
from thesean.errors import LostError
from thesean.passes.graph.surgery import unshare
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, trial_hybrid
from thesean.passes.plan.without import without
from thesean.recipe import Recipe

logger = logging.getLogger(__name__)

States = list[dict[str, torch.Tensor]]


class Gated(Aligning):
    """An alignment that gives up parts. Its hybrid and plan may be others afterwards."""

    def __init__(self, bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> None:
        super().__init__(bound_plan, hybrid, training)
        assert training.recipe.max_drop is not None
        self.most, self.second = training.recipe.max_drop, training.recipe.second
        self.kept: list[tuple[str, str]] = []  # parts that are the guide's again, and why
        self._begun: dict[str, States] = {}  # of a part by its path: its modules before anything was solved

    def run(self) -> None:
        """Raises LostError where no part is left."""
        super().run()
        if not self.snapshots:
            told = "; ".join(f"{path}: {why}" for path, why in self.kept)
            raise LostError(f"nothing is left to convert. {told}. Choose another target, or allow a larger max_drop.")

    def begins(self, parts: Iterable[int]) -> None:
        for k in parts:
            self._begun[self.hybrid.parts[k]] = deepcopy(self._states(k))

    def inner(self, name: str, compute: Callable[[], None]) -> None:
        self.training.journal.piece(name, compute, self)

    def passes(self, number: int) -> bool:
        k = self.order[len(self.snapshots) - 1]
        path, first = self.hybrid.parts[k], self._rise()
        if first <= self.most:
            return True
        self.inner(f"retry {number + 1}", partial(self._retry, k))
        second, what = self._rise(), "loss" if self.snapshots[-1].evaluation.loss is not None else "divergence"
        told = f"its {what} rose by {first:.4g}, more than max_drop {self.most:g}"
        if second <= self.most:
            self.notes.append(f"{path}: {told}; by the recipe {self.second.name!r} by {second:.4g}, which was taken")
            return False
        self._undo(k)
        self.keep(k, f"kept as the guide's: {told}, and by the recipe {self.second.name!r} by {second:.4g}")
        self.notes.append(": ".join(self.kept[-1]))
        return False

    def _rise(self) -> float:
        """What the last part cost."""
        after = self.snapshots[-1].evaluation
        if len(self.snapshots) > 1:
            return after.value - self.snapshots[-2].evaluation.value
        return after.value - self.judge.of(None, self.judged).value

    def _undo(self, k: int) -> None:
        """Back to before the part: the ones before it as they were, itself as it began."""
        self.snapshots.pop()
        before = self.snapshots[-1].state if self.snapshots else {}
        for r in self.hybrid.replacements:
            if r.name in before:
                self.hybrid.module(r).load_state_dict(before[r.name])
        for r, state in zip(self.hybrid.of_part(k), self._begun[self.hybrid.parts[k]], strict=True):
            self.hybrid.module(r).load_state_dict(state)
        self.partials.forget()

    def _retry(self, k: int) -> None:
        self._undo(k)
        recipe = self.second
        logger.info("%s: tried again by the recipe %s", self.hybrid.parts[k], recipe.name)
        taken = self.order[: len(self.snapshots) + 1]
        training = replace(self.training, recipe=self._alone(recipe))
        standing = self.standing(taken, training)
        preparing = not self.staged  # before stages all parts were
        solver_by(recipe.closed_form, self.training.guide, standing, [k], self.solving, preparing).solve(k)
        result = None
        if recipe.steps:
            if not self.unshared:
                self.unshare()
            count = max(2, len(self.hybrid.parts))
            stage = Stage(number=k, count=count, trained=(k,), compared=(k,), steps=recipe.steps, replaced=tuple(taken))
            result = self.add(Aligner(standing, training, self.solving).run(stage))
        self.snapshot(taken, result)

    @staticmethod
    def _alone(recipe: Recipe) -> Recipe:
        """For one part, on what the hybrid gives it."""
        schedule = {"schedule": "sequential", "refit_all": False}
        return recipe.model_copy(update={"alignment": recipe.alignment.model_copy(update=schedule)})

    def keep(self, k: int, why: str) -> None:
        """Part k is the guide's again, in a hybrid whose other parts are as they are now."""
        path, old = self.hybrid.parts[k], self.hybrid
        self.kept.append((path, why))
        bound_plan = without(self.bound_plan, path, why)
        hybrid = trial_hybrid(bound_plan, share=True)
        names: dict[str, str] = {}  # by what they were
        for r in hybrid.replacements:
            for other in old.of_part(r.part + (r.part >= k)):
                if other.facts.path == r.facts.path:
                    hybrid.module(r).load_state_dict(old.module(other).state_dict())
                    names[other.name] = r.name
        self.order = _left(self.order, k)
        self.snapshots = [
            replace(s, parts=tuple(_left(s.parts, k)), state={names[n]: v for n, v in s.state.items() if n in names})
            for s in self.snapshots
        ]
        if self.unshared:
            unshare(hybrid.graph_module, self.training.guide)
        self.take(bound_plan, hybrid)

    def _states(self, k: int) -> States:
        return [self.hybrid.module(r).state_dict() for r in self.hybrid.of_part(k)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": [list(pair) for pair in self.kept], "begun": dict(self._begun)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for path, why in state["kept"][len(self.kept) :]:
            self.keep(self.hybrid.parts.index(path), why)
        super().load_state_dict(state)
        self._begun = dict(state["begun"])


def _left(parts: Sequence[int], gone: int) -> list[int]:
    """Parts' numbers in a plan without one of them."""
    return [part - (part > gone) for part in parts if part != gone]
