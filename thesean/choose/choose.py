"""Target "auto": price and probe once, then for each budget search, confirm, let the finalists race, and choose."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from thesean.choose.candidates import Candidates, Choice
from thesean.choose.constraints import SUMS, Constraints
from thesean.choose.guide_in_int8 import GuideInInt8, guide_in_int8
from thesean.choose.latency import AdditiveModel, PlanTimer, fit_latency
from thesean.choose.quality import HOPELESS, Prober
from thesean.choose.search import Search
from thesean.choose.timed import Timed, sum_agrees
from thesean.distill.evaluate import Evaluation
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.plan import Plan

logger = logging.getLogger(__name__)

# What the notes of a plan begin with that meets no budget
UNMET = "warning: the constraints can't be met with these candidates"

# ... and what is said of candidates that a part was not tried with
UNTRIED = "not tried where they cost no less than the guide's own part"

# Divergences after a few steps that differ by less are as good as equal: then the plan that changes less is taken
_LEVEL = 0.05


def choose(candidates: Candidates, prober: Prober, constraints: Sequence[Constraints]) -> list[Plan]:
    """For each budget the plan with the smallest divergence that meets it, or, with a note, the nearest one found.
    Those that bound latency do so in one place.

    Raises PlanError, MissingExtraError.
    """
    length, positions = prober.training.feed.length, prober.recipe.positions
    measures = [c for c in constraints if c.measures]
    whole: GuideInInt8 | None = None
    with prober, PlanTimer(candidates, (measures or constraints)[0], length, positions) as timer:
        for apart in (True, False):
            model = fit_latency(timer, candidates, apart) if measures else None
            timed = Timed(timer, candidates, model.guide_ms) if model is not None else None
            losses = _probe(candidates, prober, model, constraints)
            if timed is not None and apart:  # once, for it has no parts
                whole = guide_in_int8(timer, prober.judge)
            plans = []
            for one in constraints:
                search = Search(candidates, one, model if one.measures else None, losses)
                plans.append(_chosen(search, prober, timed if one.measures else None, whole))
            if timed is None or not timed.refused:
                break  # else one that can be timed alone can't be exported in a whole: found out one by one
    return plans


def _chosen(search: Search, prober: Prober, timed: Timed | None, whole: GuideInInt8 | None) -> Plan:
    choices, met = search.propose(timed)
    finalists = search.finalists(choices) if met else choices
    if timed is not None:
        timed.confirm(finalists)
        inside = search.meeting(finalists, timed)
        met, finalists = bool(inside), inside or [search.nearest(finalists, timed)]
    scores = prober.race(finalists) if len(finalists) > 1 else {}
    best = _best(finalists, scores, timed)
    notes = [f"chosen for {search.constraints}: {_described(search.candidates.bind(best))}"]
    if not met:
        told = search.missed(best, math.inf if timed is None else timed.ms(best))
        notes.insert(0, f"{UNMET} ({search.constraints}): the nearest one found has {told}")
    if timed is not None:
        notes += _told_times(search, timed, best)
        if whole is not None and search.bound_ms is not None:
            divergence = scores[best].divergence if best in scores else None
            notes.append(whole.told(timed.guide_ms, search.bound_ms, divergence))
    if len(finalists) > 1:
        tuned = scores if len(scores) > 1 else {}
        told = f"{len(tuned)} of {len(finalists)} finalists were tuned for a few steps"
        notes.append(told if tuned else f"of {len(finalists)} finalists one was far ahead before any step")
        ranked = sorted(finalists, key=lambda c: scores[c].divergence if c in scores else math.inf)
        notes += [_told_finalist(search, timed, choice, prober, tuned.get(choice)) for choice in ranked]
    if search.skipped:
        notes.append(f"{UNTRIED}: {', '.join(search.skipped)}")
    plan = search.candidates.bind(best).plan
    return replace(plan, notes=(*plan.notes, *notes), candidates=search.rows(best))


def _best(finalists: Sequence[Choice], scores: dict[Choice, Evaluation], timed: Timed | None) -> Choice:
    """The least divergence; of those that are level with it the nearest to the bound, which all of them are within."""
    if not scores:
        return finalists[0]
    least = min(scores.values(), key=lambda s: s.divergence).divergence
    level = [c for c in scores if scores[c].divergence <= (1 + _LEVEL) * least]
    return max(level, key=lambda c: (timed.ms(c) if timed is not None else 0.0, -scores[c].divergence))


def _probe(
    candidates: Candidates, prober: Prober, model: AdditiveModel | None, constraints: Sequence[Constraints]
) -> list[list[float]]:
    """Divergence of each part's candidates; infinite for what doesn't fit, has no latency, or costs no less than the
    guide's own part in whatever is bounded. The cheapest come first, so that dearer ones that are worse end early.
    """
    pricing = Search(candidates, constraints[0], model, [])
    bounded = [name for name in SUMS if any(getattr(c, name) is not None for c in constraints)]

    def costs(p: int, c: int) -> list[float]:
        return [*([model.delta[p][c]] if model is not None else []), *(pricing.added(p, c, name) for name in bounded)]

    losses = []
    for p, row in enumerate(candidates.options):
        fitting = [c for c in candidates.fitting(p) if model is None or not math.isnan(model.delta[p][c])]
        kept = next((c for c in fitting if candidates.targets[c] is None), None)
        scores = dict.fromkeys(range(len(row)), math.inf)
        for c in sorted(fitting, key=lambda c: costs(p, c)):
            if c != kept and kept is not None and _no_cheaper(costs(p, c), costs(p, kept)):
                continue
            cheaper = [scores[o] for o in fitting if o != c and _no_cheaper(costs(p, c), costs(p, o))]
            scores[c] = prober.part(p, c, HOPELESS * min(cheaper, default=math.inf))
            logger.info("%s -> %s: %.4g", candidates.kept[p].planned.path, candidates.names[c], scores[c])
        losses.append([scores[c] for c in range(len(row))])
    return losses


def _no_cheaper(costs: Sequence[float], others: Sequence[float]) -> bool:
    return all(own >= other for own, other in zip(costs, others, strict=True))


def _told_times(search: Search, timed: Timed, best: Choice) -> list[str]:
    timing, timer = timed.timing(best), timed.timer
    if timing is None or search.model is None:
        return []
    constraints = search.constraints
    where = "" if timer.context is None else f", {constraints.kind} at {timer.context} tokens"
    said = search.model.of(best)
    told = (
        f"the sum over parts said {said:.3g} ms"
        if sum_agrees(said, timing.median_ms, timed.guide_ms)
        else "the sum over parts contradicts that, and was corrected by what was measured"
    )
    took = f"{timing.median_ms:.3g} ms ({timing.p20_ms:.3g} to {timing.p80_ms:.3g})"
    bound = f"bound {search.bound_ms:.3g} ms; {told}"
    notes = [f"measured {took} against the guide's {timed.guide_ms:.3g} ms{where}, batch {constraints.batch} ({bound})"]
    if timed.contradicts_itself(best):
        low, high = timed.range_ms(best)
        notes.append(
            f"warning: this machine's figures contradict each other: runs of this plan took {low:.3g} to {high:.3g} "
            "ms. Measure again where less else runs."
        )
    return notes


def _told_finalist(
    search: Search, timed: Timed | None, choice: Choice, prober: Prober, tuned: Evaluation | None
) -> str:
    told = f"divergence {(tuned or prober.solved(choice)).divergence:.3g}{'' if tuned else ' before any step'}"
    timing = None if timed is None else timed.timing(choice)
    if timing is not None and timed is not None:
        told += f", {timing.median_ms:.3g} ms ({timing.p20_ms:.3g} to {timing.p80_ms:.3g})"
        told += f", {timed.guide_ms / timing.median_ms:.2f} times as fast as the guide"
    return f"finalist: {told}: {_described(search.candidates.bind(choice))}"


def _described(bound_plan: BoundPlan) -> str:
    counts = Counter("keep" if part.target is None else str(part.target) for part in bound_plan.parts)
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
