"""The best plan under a budget: probe, price, solve, measure what was proposed, tune the finalists, choose.

Scores of parts alone add up badly (two dropped layers lose more than the sum) and so do their latencies. The additive
model therefore only proposes; what it proposes is measured whole, the bound is moved by what the model got wrong, and
the last word has a short end-to-end tuning of a few finalists, uniform choices among them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from thesean.choose.candidates import Candidates
from thesean.choose.constraints import Constraints
from thesean.choose.latency import AdditiveModel, PlanTimer, fit_latency
from thesean.choose.quality import Prober
from thesean.choose.solve import Budget, solve
from thesean.passes.plan.bind import BoundPlan, added_params
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import ProbedCandidate

logger = logging.getLogger(__name__)

Choice = tuple[int, ...]

_ROUNDS, _PROPOSALS, _FINALISTS = 4, 3, 5

# Medians of one plan in two runs differ by this much on a shared machine
_NOISE = 0.03

# What the notes of a plan begin with that meets no budget
UNMET = "warning: the constraints can't be met with these candidates"

# Bounds on sums over the network
_SUMS = ("params", "flops")

# A plan is near enough to its bound
_NEAR = 0.1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A choice and its latency, in the clock of the model's own run; None where latency is no constraint."""

    choice: Choice
    latency_ms: float | None


def choose(candidates: Candidates, prober: Prober, constraints: Constraints) -> Plan:
    """The plan with the smallest divergence that meets the constraints, or, with a note, the nearest one found.

    Raises PlanError, MissingExtraError.
    """
    length, positions = prober.training.feed.length, prober.recipe.positions
    with PlanTimer(candidates, constraints, length, positions) as timer:
        model = fit_latency(timer, candidates) if constraints.measures else None
        search = Search(candidates, constraints, model, _probe(candidates, prober, model))
        measured, met = search.propose(timer)
    finalists = search.finalists(measured)
    scores = {m.choice: prober.whole(m.choice).divergence for m in finalists} if len(finalists) > 1 else {}
    best = min(finalists, key=lambda m: scores.get(m.choice, 0.0)) if met else finalists[0]
    notes = [f"chosen for {constraints}: {_described(candidates.bind(best.choice))}"]
    if not met:
        notes.insert(0, f"{UNMET} ({constraints}): this is the nearest one found")
    if model is not None and best.latency_ms is not None:
        where = "" if timer.context is None else f", {constraints.kind} at {timer.context} tokens"
        notes.append(
            f"measured {best.latency_ms:.3g} ms against the guide's {model.guide_ms:.3g} ms{where}, batch "
            f"{constraints.batch} (bound {search.bound_ms:.3g} ms; the sum over parts said "
            f"{model.of(best.choice):.3g} ms)"
        )
    if len(scores) > 1:
        notes.append(
            f"{len(scores)} finalists were tuned for a few steps; divergence {min(scores.values()):.3g} to "
            f"{max(scores.values()):.3g}"
        )
    plan = candidates.bind(best.choice).plan
    return replace(plan, notes=(*plan.notes, *notes), candidates=search.rows(best.choice))


def _probe(candidates: Candidates, prober: Prober, model: AdditiveModel | None) -> list[list[float]]:
    """Divergence of each part's candidates; infinite for what doesn't fit or has no latency."""
    losses = []
    for p, row in enumerate(candidates.options):
        scores = []
        for c, option in enumerate(row):
            usable = option is not None and (model is None or not math.isnan(model.delta[p][c]))
            scores.append(prober.part(p, c) if usable else math.inf)
            if usable:
                logger.info("%s -> %s: %.4g", candidates.kept[p].planned.path, candidates.names[c], scores[-1])
        losses.append(scores)
    return losses


@dataclass(frozen=True)
class Search:
    """Choices under the constraints; `losses[p][c]` is infinite where a candidate can't be had. `model` is None where
    latency is no constraint.
    """

    candidates: Candidates
    constraints: Constraints
    model: AdditiveModel | None
    losses: list[list[float]]

    @cached_property
    def bound_ms(self) -> float | None:
        if self.model is None:
            return None
        bounds = [] if self.constraints.latency_ms is None else [self.constraints.latency_ms]
        if self.constraints.speedup is not None:
            bounds.append(self.model.guide_ms / self.constraints.speedup)
        return min(bounds)

    @cached_property
    def bounded_sums(self) -> dict[str, float]:
        """The bounds on parameters and FLOPs that there are."""
        return {name: bound for name in _SUMS if (bound := getattr(self.constraints, name)) is not None}

    def propose(self, timer: PlanTimer) -> tuple[list[Measured], bool]:
        """Choices that meet the constraints, measured; where none does, the nearest one and False."""
        uniform = [u for u in self.uniform() if self.fits_sums(u)]
        proposed, shifts = self.within_sums(self.bound_ms, dict.fromkeys(_SUMS, 0.0))
        model, bound_ms = self.model, self.bound_ms
        if model is None or bound_ms is None:
            everything = list(dict.fromkeys([*proposed, *uniform]))
            smallest = self.smallest()
            if not everything and self.fits_sums(smallest):
                everything = [smallest]
            return [Measured(choice=c, latency_ms=None) for c in everything or [smallest]], bool(everything)
        seen: dict[Choice, float] = {}
        for number in range(_ROUNDS):
            proposals = proposed or [self.fastest(model)]  # the model sees no way: the fastest it knows
            extra = [u for u in uniform if model.of(u) <= bound_ms * (1 + _NEAR)] if number == 0 else []
            new = [c for c in dict.fromkeys([*proposals, *extra]) if c not in seen]
            if new:
                guide_ms, values = timer.measure([self.candidates.bind(c) for c in new])
                seen |= {c: v * model.guide_ms / guide_ms for c, v in zip(new, values, strict=True)}
            first = next((c for c in proposals if math.isfinite(seen[c])), None)
            if first is None:
                break  # none of them can take one token at a time
            if bound_ms * (1 - _NEAR) <= seen[first] <= bound_ms * (1 + _NOISE) or not new:
                break
            proposed, shifts = self.within_sums(bound_ms + model.of(first) - seen[first], shifts)
        meeting = [
            Measured(choice=c, latency_ms=v)
            for c, v in seen.items()
            if v <= bound_ms * (1 + _NOISE) and self.fits_sums(c)
        ]
        if meeting:
            return meeting, True
        nearest = min(seen, key=lambda c: (not self.fits_sums(c), seen[c]))
        return [Measured(choice=nearest, latency_ms=seen[nearest])], False

    def within_sums(self, bound_ms: float | None, shifts: dict[str, float]) -> tuple[list[Choice], dict[str, float]]:
        """The best few choices of which parameters and FLOPs, counted on the whole, are within their bounds.

        Parts that share weights cost less together than their sum: a bound is moved by what the sum got wrong.
        """
        for _ in range(_ROUNDS):
            found = self.solve(bound_ms, shifts)
            fitting = [c for c in found if self.fits_sums(c)]
            if fitting or not found:
                return fitting, shifts
            plan = self.candidates.bind(found[0]).plan
            for name, bound in self.bounded_sums.items():
                shifts = shifts | {name: shifts[name] + max(0, getattr(plan, f"new_{name}") - bound)}
        return [], shifts

    def solve(self, bound_ms: float | None, shifts: dict[str, float]) -> list[Choice]:
        """The best few choices under the additive model; `shifts` tighten the bounds of sums."""
        allowed = [[c for c, loss in enumerate(row) if math.isfinite(loss)] for row in self.losses]
        budgets = []
        if self.model is not None and bound_ms is not None:
            costs = [[self.model.delta[p][c] for c in row] for p, row in enumerate(allowed)]
            budgets.append(Budget(costs=costs, bound=bound_ms - self.model.base_ms))
        for name, bound in self.bounded_sums.items():
            costs = [[self.added(p, c, name) for c in row] for p, row in enumerate(allowed)]
            budgets.append(Budget(costs=costs, bound=bound - shifts[name] - getattr(self.guide, name)))
        found = solve([[self.losses[p][c] for c in row] for p, row in enumerate(allowed)], budgets, _PROPOSALS)
        return [tuple(row[i] for row, i in zip(allowed, picked, strict=True)) for picked in found]

    @cached_property
    def guide(self) -> Plan:
        """A plan to read the guide's totals off, whatever it chooses."""
        parts = range(len(self.candidates.options))
        return self.candidates.bind([self.candidates.fitting(p)[0] for p in parts]).plan

    def added(self, part: int, candidate: int, name: str) -> float:
        """Parameters or FLOPs that a candidate adds to the whole."""
        option = self.candidates.options[part][candidate]
        assert option is not None
        row = option.planned
        if name == "params":
            return float(added_params(row))
        return 0.0 if row.kept else float(row.new_flops - row.flops)

    def fits_sums(self, choice: Choice) -> bool:
        if not self.bounded_sums:
            return True
        plan = self.candidates.bind(choice).plan
        return all(getattr(plan, f"new_{name}") <= bound for name, bound in self.bounded_sums.items())

    def uniform(self) -> list[Choice]:
        """Every candidate wherever it fits, the guide's own part elsewhere: what one would try by hand."""
        candidates, found = self.candidates, []
        for c in range(len(candidates.names)):
            choice = []
            for p, row in enumerate(self.losses):
                kept = [k for k in candidates.fitting(p) if candidates.targets[k] is None and math.isfinite(row[k])]
                if c < len(row) and math.isfinite(row[c]):
                    choice.append(c)
                elif kept:
                    choice.append(kept[0])
            if len(choice) == len(self.losses):
                found.append(tuple(choice))
        return list(dict.fromkeys(found))

    def fastest(self, model: AdditiveModel) -> Choice:
        return self._least(lambda part, candidate: model.delta[part][candidate])

    def smallest(self) -> Choice:
        """The least parameters and FLOPs, each in units of its bound."""
        bounds = self.bounded_sums.items()
        return self._least(lambda p, c: sum(self.added(p, c, name) / bound for name, bound in bounds))

    def _least(self, cost: Callable[[int, int], float]) -> Choice:
        return tuple(
            min((cost(p, c), c) for c, loss in enumerate(row) if math.isfinite(loss))[1]
            for p, row in enumerate(self.losses)
        )

    def finalists(self, measured: Sequence[Measured]) -> list[Measured]:
        """The most promising by the sum of their parts' divergences."""

        def total(m: Measured) -> float:
            return sum(row[c] for row, c in zip(self.losses, m.choice, strict=True))

        return sorted(measured, key=total)[:_FINALISTS]

    def rows(self, choice: Choice) -> tuple[ProbedCandidate, ...]:
        """What was found out of each candidate, for the plan."""
        rows = []
        for p, row in enumerate(self.candidates.options):
            for c, option in enumerate(row):
                if option is None or not math.isfinite(self.losses[p][c]):
                    continue
                planned = option.planned
                rows.append(
                    ProbedCandidate(
                        path=planned.path,
                        target=self.candidates.names[c],
                        divergence=self.losses[p][c],
                        added_ms=self.model.delta[p][c] if self.model is not None else None,
                        params=planned.params if planned.kept else planned.new_params,
                        flops=planned.flops if planned.kept else planned.new_flops,
                        chosen=choice[p] == c,
                    )
                )
        return tuple(rows)


def _described(bound_plan: BoundPlan) -> str:
    counts = Counter("keep" if part.target is None else str(part.target) for part in bound_plan.parts)
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
