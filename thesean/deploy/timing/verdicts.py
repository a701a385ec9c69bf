"""Does a conversion pay? Sentences from measured figures, each for one place: a context and a batch.

All functions are pure, so that what is said can be checked against figures written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thesean.deploy.timing.latency import Timing
from thesean.passes.plan.rows import LatencyKind, PlanLatency
from thesean.units import milliseconds, times


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured in turns at one context and batch; None for what doesn't run there. See `PlanLatency`."""

    context: int | None
    batch: int
    kind: LatencyKind
    guide: Timing
    plan: Timing | None
    ceiling: Timing | None
    cache_floor: Timing | None = None
    steps: bool = False  # tokens: the plan carries a state

    def row(self) -> PlanLatency:
        def median(latency: Timing | None) -> float | None:
            return None if latency is None else round(latency.median_ms, 4)

        return PlanLatency(
            context=self.context,
            batch=self.batch,
            kind=self.kind,
            guide_ms=median(self.guide),
            plan_ms=median(self.plan),
            ceiling_ms=median(self.ceiling),
            cache_floor_ms=median(self.cache_floor),
        )

    def __str__(self) -> str:
        """ "at 128 tokens, batch 8"; a batch of one goes without saying."""
        at = [] if self.context is None else [f"at {self.context} tokens"]
        return ", ".join(
            [*at, *([f"batch {self.batch}" if at else f"at batch {self.batch}"] if self.batch > 1 else [])]
        )


# A busy machine's ranges are wide, but medians of runs in turns that differ by more are no coincidence
_SURELY = 1.2


def is_level(a: Timing, b: Timing) -> bool:
    """Their 20 to 80 percent ranges overlap and their medians are near: the difference is within the noise."""
    near = max(a.median_ms, b.median_ms) <= _SURELY * min(a.median_ms, b.median_ms)
    return near and a.p20_ms <= b.p80_ms and b.p20_ms <= a.p80_ms


def is_slower(a: Timing, b: Timing) -> bool:
    return a.median_ms > b.median_ms and not is_level(a, b)


def total(latencies: Sequence[Timing]) -> Timing:
    """One after the other."""
    return Timing(
        median_ms=sum(v.median_ms for v in latencies),
        p20_ms=sum(v.p20_ms for v in latencies),
        p80_ms=sum(v.p80_ms for v in latencies),
        repeats=min(v.repeats for v in latencies),
    )


def verdicts(places: Sequence[Measurement]) -> list[str]:
    """One sentence a place, in order."""
    return [_token(p) if p.kind == "token" else _whole(p, places) for p in places]


def slower_targets(
    places: Sequence[Measurement], parts: Mapping[str, Sequence[tuple[Timing, Timing]]], names: Sequence[str]
) -> list[str]:
    """A warning for each target that takes longer than what it replaces.

    Where one target replaces everything, at every place: whole networks less the ceiling. Where several do, at the
    first place only: `parts` are (before, after) of the parts by the target's name, measured by themselves.
    """
    told = []
    whole = [p for p in places if p.kind != "token"]
    if len(set(names)) == 1:
        for p in whole:
            if p.plan is not None and is_slower(p.plan, p.guide):
                rest = 0.0 if p.ceiling is None else min(p.ceiling.median_ms, p.guide.median_ms)
                told.append(_slower(names[0], p, p.plan.median_ms - rest, p.guide.median_ms - rest))
        return told
    for name, pairs in parts.items():
        before, after = total([b for b, _ in pairs]), total([a for _, a in pairs])
        if is_slower(after, before):
            told.append(_slower(name, whole[0], after.median_ms, before.median_ms))
    return told


def _slower(name: str, place: Measurement, new_ms: float, old_ms: float) -> str:
    where = f" {place}" if str(place) else ""
    against = f"{milliseconds(new_ms)} against {milliseconds(old_ms)}"
    return f"warning: target {name!r} is slower than the parts it replaces{where}: {against}"


def _whole(place: Measurement, places: Sequence[Measurement]) -> str:
    """Prefill or one forward: the ceiling, what the plan reaches of it, and where the ceiling is higher."""
    of = "a forward pass" if place.kind == "forward" else "the latency"
    where = f" {place}" if str(place) else ""
    pays = place.plan is not None and is_slower(place.guide, place.plan)
    if place.ceiling is None:
        told = f"how much of {of} the replaced parts are{where} could not be measured"
    elif is_slower(place.guide, place.ceiling):
        share = 1 - place.ceiling.median_ms / place.guide.median_ms
        told = (
            f"the replaced parts are {share:.0%} of {of}{where}: no replacement of them can exceed "
            f"{times(place.guide.median_ms, place.ceiling.median_ms)}"
        )
    else:
        told = (
            f"without the replaced parts {of}{where} is level with the guide's ({_against(place.ceiling, place)}): no "
            "replacement of them can be seen to pay"
        )
    if place.plan is not None:
        told += f"; this plan {_reached(place.plan, place)}"
    elsewhere = _higher(place, places)
    if elsewhere is not None and elsewhere.ceiling is not None and not pays:
        told += f"; {elsewhere} the ceiling is {times(elsewhere.guide.median_ms, elsewhere.ceiling.median_ms)}"
    return told


def _reached(plan: Timing, place: Measurement) -> str:
    if is_level(plan, place.guide):
        return f"is level with the guide and does not pay ({_against(plan, place)})"
    if is_slower(plan, place.guide):
        return f"is slower than the guide and does not pay ({_against(plan, place)})"
    return f"reaches {times(place.guide.median_ms, plan.median_ms)}"


def _against(latency: Timing, place: Measurement) -> str:
    return f"{milliseconds(latency.median_ms)} against {milliseconds(place.guide.median_ms)}"


def _higher(place: Measurement, places: Sequence[Measurement]) -> Measurement | None:
    """The place of the same kind and batch with the highest ceiling, if that is clearly higher than this one's."""
    alike = [p for p in places if (p.kind, p.batch) == (place.kind, place.batch) and p.ceiling is not None]
    best = max(alike, key=_ceiling, default=None)
    if best is None or best is place or _ceiling(best) <= 1.1 * _ceiling(place):
        return None
    return best


def _ceiling(place: Measurement) -> float:
    return 1.0 if place.ceiling is None else place.guide.median_ms / place.ceiling.median_ms


def _token(place: Measurement) -> str:
    """A guide without a cache is no rival: it is the least that a cache can take that a plan has to beat."""
    batch = f", batch {place.batch}" if place.batch > 1 else ""
    told = f"one more token after {place.context}{batch}: "
    plan, floor = place.plan, place.cache_floor
    if plan is None:
        told += "this plan was not measured"
    elif not place.steps:
        told += f"this plan carries no state and reads everything again ({milliseconds(plan.median_ms)})"
    elif floor is None:
        told += f"this plan {_reached(plan, place)}"
    elif is_level(plan, floor):
        told += f"this plan is level with the least that a key-value cache can take ({_bounds(plan, floor)})"
    elif is_slower(plan, floor):
        told += f"a key-value cache can be faster than this plan while the past is short ({_bounds(plan, floor)})"
    else:
        faster = times(floor.median_ms, plan.median_ms)
        told += f"this plan is at least {faster} as fast as any key-value cache ({_bounds(plan, floor)})"
    return told


def _bounds(plan: Timing, floor: Timing) -> str:
    return f"{milliseconds(plan.median_ms)} against {milliseconds(floor.median_ms)} or more"
