"""The best choices under one budget: the additive model proposes, whole networks are measured, and what was measured
corrects the model.

Scores of parts alone add up badly (two dropped layers lose more than the sum) and so do their latencies: the last word
has what was measured on whole networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from thesean.choose.candidates import Candidates, Choice
from thesean.choose.constraints import SUMS, Constraints
from thesean.choose.latency import AdditiveModel
from thesean.choose.quality import HOPELESS
from thesean.choose.solve import Budget, solve
from thesean.choose.timed import Timed
from thesean.passes.plan.bind import added_params
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import ProbedCandidate

# Proposals of the first round, which are the finalists where the model is right, and of each later one: to measure one
# is to export it, which takes longest of all
_ROUNDS, _PROPOSALS, _MORE, _FINALISTS = 4, 3, 1, 5

# Medians of one plan in two runs differ by this much on a shared machine
_NOISE = 0.03

# A plan is near enough to its bound
_NEAR = 0.1


@dataclass(frozen=True)
class Search:
    """Choices under one budget; `losses[p][c]` is infinite where a candidate can't be had. `model` is None where
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
        return {name: bound for name in SUMS if (bound := getattr(self.constraints, name)) is not None}

    def propose(self, timed: Timed | None) -> tuple[list[Choice], bool]:
        """Choices that meet the constraints; where none does, the nearest one and False. `timed` where latency is
        bounded.
        """
        if timed is None or self.bound_ms is None:
            proposed, _ = self.within_sums(None, dict.fromkeys(SUMS, 0.0))
            everything = self._hopeful([*proposed, *self.uniform()])
            smallest = self.smallest()
            if not everything and self.fits_sums(smallest):
                everything = [smallest]
            return everything or [smallest], bool(everything)
        tried = self._tried(timed, self.bound_ms)
        inside = self.meeting(tried, timed)
        return inside or [self.nearest(tried, timed)], bool(inside)

    def _tried(self, timed: Timed, bound_ms: float) -> list[Choice]:
        """Choices around the bound, all measured."""
        tried = dict.fromkeys(c for c, ms in timed.all_ms.items() if bound_ms * (1 - _NEAR) <= ms <= bound_ms)
        first: Choice | None = None
        count, aim, shifts = _PROPOSALS, bound_ms, dict.fromkeys(SUMS, 0.0)
        for number in range(_ROUNDS):
            assert self.model is not None
            model = self.model.corrected(timed.all_ms)
            search = replace(self, model=model)
            if first is not None:
                aim = bound_ms + model.of(first) - timed.ms(first)
            proposed, shifts = search.within_sums(aim, shifts, count)
            proposals = proposed or [search.fastest(model)]  # the model sees no way: the fastest it knows
            extra = [u for u in self.uniform() if model.of(u) <= bound_ms * (1 + _NEAR)] if number == 0 else []
            hopeful = sorted((u for u in self._hopeful([*proposals, *extra]) if u in extra), key=self.total)
            new = [c for c in dict.fromkeys([*proposals, *hopeful[:1]]) if c not in tried]
            tried |= dict.fromkeys(new)
            timed.see(new)
            first = next((c for c in proposals if math.isfinite(timed.ms(c))), None)
            if first is None or not new:
                break  # none of them can take one token at a time
            if sum(bound_ms * (1 - _NEAR) <= timed.ms(c) <= bound_ms for c in tried) > 1:
                break  # two to choose between
            count = _MORE
        return list(tried)

    def meeting(self, tried: Sequence[Choice], timed: Timed) -> list[Choice]:
        """Those inside the bounds; where there is none, those that are outside by no more than medians differ."""
        assert self.bound_ms is not None
        for bound_ms in (self.bound_ms, self.bound_ms * (1 + _NOISE)):
            if inside := [c for c in tried if timed.ms(c) <= bound_ms and self.fits_sums(c)]:
                return inside
        return []

    def nearest(self, tried: Sequence[Choice], timed: Timed) -> Choice:
        return min(tried, key=lambda c: (not self.fits_sums(c), timed.ms(c)))

    def missed(self, choice: Choice, ms: float) -> str:
        """By how much a choice misses its bounds; `ms` is its latency, where that is bounded."""
        plan, found = self.candidates.bind(choice).plan, []
        if self.model is not None and self.bound_ms is not None and not ms <= self.bound_ms:
            if math.isinf(ms):
                return f"no {self.constraints.kind} latency"
            found.append(f"{ms:.3g} ms of at most {self.bound_ms:.3g} ({self.model.guide_ms / ms:.2f} times as fast)")
        for name, bound in self.bounded_sums.items():
            if (count := getattr(plan, f"new_{name}")) > bound:
                word = {"params": "parameters", "flops": "FLOPs"}[name]
                found.append(f"{count:,} {word} of at most {bound:,}")
        return " and ".join(found)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Candidates that were not probed in some part, though they have a latency there."""
        found: dict[str, None] = {}
        for p, row in enumerate(self.candidates.options):
            for c, option in enumerate(row):
                timed = self.model is None or not math.isnan(self.model.delta[p][c])
                if option is not None and timed and math.isinf(self.losses[p][c]):
                    found[self.candidates.names[c]] = None
        return tuple(found)

    def total(self, choice: Choice) -> float:
        """The sum of its parts' divergences."""
        return sum(row[c] for row, c in zip(self.losses, choice, strict=True))

    def _hopeful(self, choices: Sequence[Choice]) -> list[Choice]:
        """Those within the bounds on sums that lose no multiple of what the best of them does."""
        fitting = [c for c in dict.fromkeys(choices) if self.fits_sums(c)]
        least = min(map(self.total, fitting), default=0.0)
        return [c for c in fitting if self.total(c) <= HOPELESS * least]

    def within_sums(
        self, bound_ms: float | None, shifts: dict[str, float], count: int = _PROPOSALS
    ) -> tuple[list[Choice], dict[str, float]]:
        """The best few choices of which parameters and FLOPs, counted on the whole, are within their bounds.

        Parts that share weights cost less together than their sum: a bound is moved by what the sum got wrong.
        """
        for _ in range(_ROUNDS):
            found = self.solve(bound_ms, shifts, count)
            fitting = [c for c in found if self.fits_sums(c)]
            if fitting or not found:
                return fitting, shifts
            plan = self.candidates.bind(found[0]).plan
            for name, bound in self.bounded_sums.items():
                shifts = shifts | {name: shifts[name] + max(0, getattr(plan, f"new_{name}") - bound)}
        return [], shifts

    def solve(self, bound_ms: float | None, shifts: dict[str, float], count: int) -> list[Choice]:
        """The best `count` choices under the additive model; `shifts` tighten the bounds of sums."""
        allowed = [[c for c, loss in enumerate(row) if math.isfinite(loss)] for row in self.losses]
        budgets = []
        if self.model is not None and bound_ms is not None:
            costs = [[self.model.delta[p][c] for c in row] for p, row in enumerate(allowed)]
            budgets.append(Budget(costs=costs, bound=bound_ms - self.model.base_ms))
        for name, bound in self.bounded_sums.items():
            costs = [[self.added(p, c, name) for c in row] for p, row in enumerate(allowed)]
            budgets.append(Budget(costs=costs, bound=bound - shifts[name] - getattr(self.guide, name)))
        found = solve([[self.losses[p][c] for c in row] for p, row in enumerate(allowed)], budgets, count)
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

    def finalists(self, choices: Sequence[Choice]) -> list[Choice]:
        """The most promising by the sum of their parts' divergences."""
        return sorted(self._hopeful(choices) or choices, key=self.total)[:_FINALISTS]

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
