"""The best plan under a budget: probe, price, solve, measure what was proposed, tune the finalists, choose.

Scores of parts alone add up badly (two dropped layers lose more than the sum) and so do their latencies. The additive
model therefore only proposes; what it proposes is measured whole, the bound is moved by what the model got wrong, and
the last word has a short end-to-end tuning of a few finalists, uniform choices among them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


def choose(candidates: Candidates, prober: Prober, constraints: Constraints, length: int | None) -> Plan:
    """The plan with the smallest divergence that meets the constraints, or, with a note, the nearest one found.

    `length` is that of the example sequences, None where there is no time. Raises PlanError, MissingExtraError.
    """
    with PlanTimer(candidates, constraints, length, prober.recipe.positions) as latencies:
        model = fit_latency(latencies, candidates) if constraints.measures else None
        bound_ms = _bound(constraints, model)
        losses = _probe(candidates, prober, model)
        measured, met = _propose(candidates, constraints, latencies, model, bound_ms, losses)
    finalists = _finalists(measured, losses)
    scores = {m.choice: prober.whole(m.choice).divergence for m in finalists} if len(finalists) > 1 else {}
    best = min(finalists, key=lambda m: scores.get(m.choice, 0.0)) if met else finalists[0]
    plan = candidates.bind(best.choice).plan
    return replace(
        plan,
        notes=(*plan.notes, *_notes(candidates, constraints, latencies, model, bound_ms, best, met, scores)),
        candidates=_rows(candidates, losses, model, best.choice),
    )


def _bound(constraints: Constraints, model: AdditiveModel | None) -> float | None:
    if model is None:
        return None
    bounds = [] if constraints.latency_ms is None else [constraints.latency_ms]
    if constraints.speedup is not None:
        bounds.append(model.guide_ms / constraints.speedup)
    return min(bounds)


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


def _propose(
    candidates: Candidates,
    constraints: Constraints,
    latencies: PlanTimer,
    model: AdditiveModel | None,
    bound_ms: float | None,
    losses: list[list[float]],
) -> tuple[list[Measured], bool]:
    """Choices that meet the constraints, measured; where none does, the nearest one and False."""
    uniform = [u for u in _uniform(candidates, losses) if _fits_sums(candidates, constraints, u)]
    proposed, shifts = _within_sums(candidates, constraints, losses, model, bound_ms, dict.fromkeys(_SUMS, 0.0))
    if model is None or bound_ms is None:
        everything = list(dict.fromkeys([*proposed, *uniform]))
        smallest = _smallest(candidates, constraints, losses)
        if not everything and _fits_sums(candidates, constraints, smallest):
            everything = [smallest]
        return [Measured(choice=c, latency_ms=None) for c in everything or [smallest]], bool(everything)
    seen: dict[Choice, float] = {}
    shift = 0.0
    for number in range(_ROUNDS):
        proposals = proposed or [_fastest(candidates, model, losses)]  # the model sees no way: the fastest it knows
        extra = [u for u in uniform if model.of(u) <= bound_ms * (1 + _NEAR)] if number == 0 else []
        new = [c for c in dict.fromkeys([*proposals, *extra]) if c not in seen]
        if new:
            guide_ms, values = latencies.measure([candidates.bind(c) for c in new])
            seen |= {c: v * model.guide_ms / guide_ms for c, v in zip(new, values, strict=True)}
        first = proposals[0]
        if bound_ms * (1 - _NEAR) <= seen[first] <= bound_ms * (1 + _NOISE) or not new:
            break
        shift = model.of(first) - seen[first]
        proposed, shifts = _within_sums(candidates, constraints, losses, model, bound_ms + shift, shifts)
    meeting = [
        Measured(choice=c, latency_ms=v)
        for c, v in seen.items()
        if v <= bound_ms * (1 + _NOISE) and _fits_sums(candidates, constraints, c)
    ]
    if meeting:
        return meeting, True
    nearest = min(seen, key=lambda c: (not _fits_sums(candidates, constraints, c), seen[c]))
    return [Measured(choice=nearest, latency_ms=seen[nearest])], False


def _within_sums(
    candidates: Candidates,
    constraints: Constraints,
    losses: list[list[float]],
    model: AdditiveModel | None,
    bound_ms: float | None,
    shifts: dict[str, float],
) -> tuple[list[Choice], dict[str, float]]:
    """The best few choices of which parameters and FLOPs, counted on the whole, are within their bounds.

    Parts that share weights cost less together than their sum: a bound is moved by what the sum got wrong.
    """
    for _ in range(_ROUNDS):
        found = _solve(candidates, constraints, losses, model, bound_ms, shifts)
        fitting = [c for c in found if _fits_sums(candidates, constraints, c)]
        if fitting or not found:
            return fitting, shifts
        plan = candidates.bind(found[0]).plan
        for name in _SUMS:
            bound = getattr(constraints, name)
            if bound is not None:
                shifts = shifts | {name: shifts[name] + max(0, getattr(plan, f"new_{name}") - bound)}
    return [], shifts


def _solve(
    candidates: Candidates,
    constraints: Constraints,
    losses: list[list[float]],
    model: AdditiveModel | None,
    bound_ms: float | None,
    shifts: dict[str, float],
) -> list[Choice]:
    """The best few choices under the additive model; `shifts` tighten the bounds of sums."""
    allowed = [[c for c, loss in enumerate(row) if math.isfinite(loss)] for row in losses]
    budgets = []
    if model is not None and bound_ms is not None:
        costs = [[model.delta[p][c] for c in row] for p, row in enumerate(allowed)]
        budgets.append(Budget(costs=costs, bound=bound_ms - model.base_ms))
    for name in _SUMS:
        bound = getattr(constraints, name)
        if bound is not None:
            costs = [[_added(candidates, p, c, name) for c in row] for p, row in enumerate(allowed)]
            left = bound - shifts[name] - getattr(candidates.bind(_kept(candidates)).plan, name)
            budgets.append(Budget(costs=costs, bound=left))
    found = solve([[losses[p][c] for c in row] for p, row in enumerate(allowed)], budgets, _PROPOSALS)
    return [tuple(row[i] for row, i in zip(allowed, picked, strict=True)) for picked in found]


def _added(candidates: Candidates, part: int, candidate: int, name: str) -> float:
    option = candidates.options[part][candidate]
    assert option is not None
    row = option.planned
    if name == "params":
        return float(added_params(row))
    return 0.0 if row.kept else float(row.new_flops - row.flops)


def _kept(candidates: Candidates) -> list[int]:
    """Some choice, to read the guide's totals off."""
    return [candidates.fitting(p)[0] for p in range(len(candidates.options))]


def _fits_sums(candidates: Candidates, constraints: Constraints, choice: Choice) -> bool:
    plan = candidates.bind(choice).plan
    params_fit = constraints.params is None or plan.new_params <= constraints.params
    return params_fit and (constraints.flops is None or plan.new_flops <= constraints.flops)


def _uniform(candidates: Candidates, losses: list[list[float]]) -> list[Choice]:
    """Every candidate wherever it fits, the guide's own part elsewhere: what one would try by hand."""
    found = []
    for c in range(len(candidates.names)):
        choice = []
        for p, row in enumerate(losses):
            kept = [k for k in candidates.fitting(p) if candidates.targets[k] is None and math.isfinite(row[k])]
            if c < len(row) and math.isfinite(row[c]):
                choice.append(c)
            elif kept:
                choice.append(kept[0])
        if len(choice) == len(losses):
            found.append(tuple(choice))
    return list(dict.fromkeys(found))


def _fastest(candidates: Candidates, model: AdditiveModel, losses: list[list[float]]) -> Choice:
    return tuple(
        min((c for c, loss in enumerate(row) if math.isfinite(loss)), key=lambda c, p=p: model.delta[p][c])  # type: ignore[misc]
        for p, row in enumerate(losses)
    )


def _smallest(candidates: Candidates, constraints: Constraints, losses: list[list[float]]) -> Choice:
    """The least parameters and FLOPs, each in units of its bound."""
    bounds = {name: bound for name in _SUMS if (bound := getattr(constraints, name)) is not None}

    def added(part: int, candidate: int) -> float:
        return sum(_added(candidates, part, candidate, name) / bound for name, bound in bounds.items())

    return tuple(
        min((c for c, loss in enumerate(row) if math.isfinite(loss)), key=lambda c, p=p: added(p, c))  # type: ignore[misc]
        for p, row in enumerate(losses)
    )


def _finalists(measured: Sequence[Measured], losses: list[list[float]]) -> list[Measured]:
    """The most promising by the sum of their parts' divergences."""
    return sorted(measured, key=lambda m: sum(row[c] for row, c in zip(losses, m.choice, strict=True)))[:_FINALISTS]


def _notes(
    candidates: Candidates,
    constraints: Constraints,
    latencies: PlanTimer,
    model: AdditiveModel | None,
    bound_ms: float | None,
    best: Measured,
    met: bool,
    scores: dict[Choice, float],
) -> list[str]:
    bound_plan = candidates.bind(best.choice)
    told = [f"chosen for {constraints}: {_described(bound_plan)}"]
    if model is not None and best.latency_ms is not None:
        where = "" if latencies.context is None else f", {constraints.kind} at {latencies.context} tokens"
        told.append(
            f"measured {best.latency_ms:.3g} ms against the guide's {model.guide_ms:.3g} ms{where}, batch "
            f"{constraints.batch} (bound {bound_ms:.3g} ms; the sum over parts said {model.of(best.choice):.3g} ms)"
        )
    if not met:
        told.insert(0, f"{UNMET} ({constraints}): this is the nearest one found")
    if len(scores) > 1:
        told.append(
            f"{len(scores)} finalists were tuned for a few steps; divergence {min(scores.values()):.3g} to "
            f"{max(scores.values()):.3g}"
        )
    return told


def _described(bound_plan: BoundPlan) -> str:
    counts: dict[str, int] = {}
    for part in bound_plan.parts:
        name = "keep" if part.target is None else str(part.target)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _rows(
    candidates: Candidates, losses: list[list[float]], model: AdditiveModel | None, choice: Choice
) -> tuple[ProbedCandidate, ...]:
    rows = []
    for p, row in enumerate(candidates.options):
        for c, option in enumerate(row):
            if option is None or not math.isfinite(losses[p][c]):
                continue
            planned = option.planned
            rows.append(
                ProbedCandidate(
                    path=planned.path,
                    target=candidates.names[c],
                    divergence=losses[p][c],
                    added_ms=model.delta[p][c] if model is not None else None,
                    params=planned.params if planned.kept else planned.new_params,
                    flops=planned.flops if planned.kept else planned.new_flops,
                    chosen=choice[p] == c,
                )
            )
    return tuple(rows)
