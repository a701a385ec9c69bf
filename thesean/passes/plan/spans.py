"""Plain convolutions in a row as one part, for a target that takes channels out from between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from thesean.passes.plan.divide import Division
from thesean.passes.plan.merge import Group, join_any
from thesean.passes.plan.sites import SiteFinder, takes_channels
from thesean.targets import Target
from thesean.targets.shared.channels import Concatenate, Join


def spanned(
    division: Division, targets: Mapping[str, Target | None], sites: SiteFinder
) -> tuple[Division, dict[str, Target | None]]:
    """The division with such parts joined where they follow each other and have one target, and the targets by path.

    Residual blocks stay by themselves, for the stream between two of them goes through both; so do parts that were
    merged already, and those between which no channels can go.
    """
    if division.settings.part_globs is not None or any(len(g.members) > 1 for g in division.groups):
        return division, dict(targets)
    groups: list[Group] = []
    chosen: dict[str, Target | None] = {}
    for group in division.groups:
        target = targets[group.path]
        before = groups[-1] if groups and _plain(groups[-1], chosen[groups[-1].path], sites) else None
        together = None
        if before is not None and chosen[before.path] == target and _plain(group, target, sites):
            together = join_any(division.flow, before, group)
        if together is not None and before is not None and sites.channels(together.region) is not None:
            groups[-1] = together
            del chosen[before.path]
            group = together
        else:
            groups.append(group)
        chosen[group.path] = target
    single = {group.path: group for group in division.groups}
    kept: list[Group] = []
    for group in groups:
        joined = len(group.members) > 1
        apart = [single[m.path] for m in group.members] if joined and not sites.narrows(group.region) else [group]
        kept += apart
        chosen |= dict.fromkeys((each.path for each in apart), chosen[group.path])
    return replace(division, groups=tuple(kept)), {group.path: chosen[group.path] for group in kept}


def _plain(group: Group, target: Target | None, sites: SiteFinder) -> bool:
    """Whether a part's convolutions stand in a row, with nothing added to what they give, or put beside it."""
    if target is None or not takes_channels(target):
        return False
    facts = sites.channels(group.region)
    if facts is None or (facts.maps[0].places == 1 and facts.inner and len(group.members) == 1):
        return False
    return not any(isinstance(s, Concatenate) or (isinstance(s, Join) and s.form == "sum") for s in facts.steps)
