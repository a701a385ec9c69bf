"""What each part could become: every candidate target bound to every part that it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.analyse.fingerprint import fingerprint
from thesean.passes.plan.bind import Binder, BoundPart, BoundPlan
from thesean.passes.plan.divide import Division
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import KEEP
from thesean.passes.plan.sites import takes_channels
from thesean.passes.plan.spans import spanned
from thesean.targets import Target, resolve

Choice = tuple[int, ...]  # a candidate's number for each part

# Keep, drop, and in between a recurrence, a convolution or fewer heads for what mixes, fewer neurons for what doesn't.
# What doesn't fit a part is not a candidate there.
DEFAULT: tuple[str | Target, ...] = (
    KEEP,
    "identity",
    "rnn",
    "conv",
    Target("narrow-heads", ratio=0.5),
    Target("narrow", ratio=0.75),
    Target("narrow", ratio=0.5),
    Target("narrow", ratio=0.25),
)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """`options[p][c]` is part p with candidate c, None where it doesn't fit; `names[c]` in the order given.

    `classes[p]` is equal for parts of the same operators, shapes and wiring: what one costs, all of them do.
    """

    names: tuple[str, ...]
    targets: tuple[Target | None, ...]
    options: tuple[tuple[BoundPart | None, ...], ...]
    kept: tuple[BoundPart, ...]  # every part as the guide has it
    classes: tuple[int, ...]
    binder: Binder
    settings: Plan

    def bind(self, choice: Sequence[int]) -> BoundPlan:
        """The plan in which part p becomes candidate `choice[p]`."""
        parts = []
        for row, c in zip(self.options, choice, strict=True):
            part = row[c]
            assert part is not None
            parts.append(part)
        return self.binder.bind(parts, self.settings)

    def alone(self, part: int, candidate: int) -> BoundPlan:
        """The plan in which only this part is replaced."""
        option = self.options[part][candidate]
        assert option is not None
        return self.binder.bind([option if p == part else kept for p, kept in enumerate(self.kept)], self.settings)

    def fitting(self, part: int) -> list[int]:
        return [c for c, option in enumerate(self.options[part]) if option is not None]


def find_candidates(division: Division, given: Sequence[str | Target] | None) -> Candidates:
    """Parts that keep= names have no choice. Raises PlanError where no candidate but the guide's own fits anywhere,
    UnknownNameError, and TargetMismatchError for options that a family doesn't have.
    """
    given = (given,) if isinstance(given, (str, Target)) else given  # a lone name is not a sequence of letters
    words = tuple(given) if given is not None else DEFAULT
    if not words:
        raise PlanError("candidates: expected at least one target, found none.")
    targets = tuple(None if w == KEEP else resolve(w) for w in words)
    binder = Binder(division.captured, division.flow)
    narrowing = next((t for t in targets if t is not None and takes_channels(t)), None)
    division, _ = spanned(
        division, {g.path: None if g.path in division.kept else narrowing for g in division.groups}, binder.site_finder
    )
    groups, kept = division.groups, division.members()
    options: list[tuple[BoundPart | None, ...]] = []
    reasons: dict[str, str] = {}
    for group, member in zip(groups, kept, strict=True):
        row: list[BoundPart | None] = []
        for target in targets:
            if target is None or group.path in division.kept:
                row.append(binder.part(group, None, member) if target is None else None)
                continue
            try:
                row.append(binder.part(group, target, member))
            except TargetMismatchError as error:
                reasons[str(target)] = str(error)
                row.append(None)
        if not any(row):  # "keep" is not among the candidates, and none of them fits
            row.append(binder.part(group, None, member))
        else:
            row.append(None)
        options.append(tuple(row))
    if not any(option is not None and option.target is not None for row in options for option in row):
        raise PlanError(f"no candidate fits any part: {'; '.join(reasons.values()) or 'all parts are kept'}")
    signatures = [fingerprint(g.region) for g in groups]
    order = {s: i for i, s in enumerate(dict.fromkeys(signatures))}
    return Candidates(
        names=(*(KEEP if t is None else str(t) for t in targets), KEEP),
        targets=(*targets, None),
        options=tuple(options),
        kept=tuple(binder.part(g, None, k) for g, k in zip(groups, kept, strict=True)),
        classes=tuple(order[s] for s in signatures),
        binder=binder,
        settings=division.settings,
    )
