"""Fewer target parts than guide parts: neighbours become one part, those first whose lesser one is missed least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from thesean.errors import PlanError
from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.regions import Region, is_linear_map, same_shape, span
from thesean.passes.plan.leave_out import LeavingOut
from thesean.passes.plan.partition import NamedRegion

# Members that are tried together with those that are gone already, at each step
_HOPEFUL = 3


@dataclass(frozen=True, kw_only=True)
class Group:
    """One part of the plan: a region of the guide, or several that follow each other, with what lies between."""

    path: str
    region: Region
    members: tuple[NamedRegion, ...]


def singles(chosen: Sequence[NamedRegion]) -> list[Group]:
    return [Group(path=c.path, region=c.region, members=(c,)) for c in chosen]


def merge_by_count(flow: DataFlow, chosen: Sequence[NamedRegion], merge: int) -> list[Group]:
    """Every `merge` neighbours become one part; a run's last one may be smaller. Raises PlanError."""
    if merge < 1:
        raise PlanError(f"merge: expected 1 or more, found {merge}.")
    groups: list[Group] = []
    for single in singles(chosen):
        together = _join(flow, groups[-1], single) if groups and len(groups[-1].members) < merge else None
        if together is not None:
            groups[-1] = together
        else:
            groups.append(single)
    if merge > 1 and len(groups) == len(chosen):
        raise PlanError(f"merge={merge}: no two parts follow each other: {', '.join(c.path for c in chosen)}.")
    return groups


def merge_to_count(
    flow: DataFlow, chosen: Sequence[NamedRegion], target_parts: int, leaving_out: LeavingOut
) -> tuple[list[Group], dict[str, str]]:
    """Merge neighbours until `target_parts` are left, and say which member of each merged part stays: path -> path.

    At each step one member goes that the outputs miss least, with those that are gone already (as SLEB does, Song et
    al. 2024, with the outputs in place of the loss); of the candidates the three are tried together with them that
    cost least alone. Raises PlanError when that many can't be reached.
    """
    if not 1 <= target_parts <= len(chosen):
        raise PlanError(f"target_parts: expected 1 to {len(chosen)}, the parts that there are, found {target_parts}.")
    groups, stays = singles(chosen), {c.path: c for c in chosen}
    gone: list[Region] = []
    while len(groups) > target_parts:
        moves = []
        for at, (a, b) in enumerate(itertools.pairwise(groups)):
            joined = _join(flow, a, b)
            if joined is not None:
                both = (stays[a.path], stays[b.path])
                moves += [(at, joined, both[1 - k], m) for k, m in enumerate(both) if _can_go(m)]
        if not moves:
            raise PlanError(
                f"target_parts={target_parts}: no more than down to {len(groups)} parts can be merged; the others do "
                "not follow each other, or change the shape twice."
            )
        moves.sort(key=lambda move: leaving_out.lost([move[3].region]))
        hopeful = list(dict.fromkeys(move[3].path for move in moves))[:_HOPEFUL]
        tried = [move for move in moves if move[3].path in hopeful]
        at, joined, kept, member = min(tried, key=lambda move: leaving_out.lost([*gone, move[3].region]))
        gone.append(member.region)
        groups[at : at + 2] = [joined]
        stays[joined.path] = kept
    return groups, {g.path: stays[g.path].path for g in groups if len(g.members) > 1}


def regroup(flow: DataFlow, chosen: Sequence[NamedRegion], members: Sequence[Sequence[str]]) -> list[Group]:
    """The groups of a written plan. Raises PlanError when its members don't follow each other."""
    by_path = {c.path: c for c in chosen}
    groups = []
    for paths in members:
        group = singles([by_path[paths[0]]])[0]
        for path in paths[1:]:
            joined = join_any(flow, group, singles([by_path[path]])[0])
            if joined is None:
                raise PlanError(f"parts {group.path!r} and {path!r} can't be merged. Make a new plan.")
            group = joined
        groups.append(group)
    return groups


def most_missed(group: Group, leaving_out: LeavingOut) -> NamedRegion:
    """The member to keep where the others are dropped: one that changes the shape, or else the one with which alone the
    outputs are nearest.
    """
    shaping = [m for m in group.members if not _can_go(m)]
    if shaping:
        return shaping[0]
    return min(group.members, key=lambda m: leaving_out.lost([o.region for o in group.members if o is not m]))


def _can_go(member: NamedRegion) -> bool:
    return same_shape(member.region.entry, member.region.exit)


def _join(flow: DataFlow, a: Group, b: Group) -> Group | None:
    """Both as one part; None where other data comes in between, or where both change the shape."""
    return None if _reshapes_twice(a, b) else join_any(flow, a, b)


def join_any(flow: DataFlow, a: Group, b: Group) -> Group | None:
    """Both as one part, whatever their shapes, for a target that drops no member; None where other data comes in
    between.
    """
    region = span(flow, a.region, b.region)
    if region is None:
        return None
    inside = {*a.region.nodes, *b.region.nodes}
    if any(is_linear_map(n) for n in region.nodes if n not in inside):
        return None  # a part that was not chosen lies in between
    first, last = a.members[0].path, b.members[-1].path
    if _reshapes_twice(a, b):  # a run of convolutions, each of which may span a few modules
        first, last = first.split("..")[0], last.split("..")[-1]
    return Group(path=_shared_path(first, last), region=region, members=a.members + b.members)


def _reshapes_twice(a: Group, b: Group) -> bool:
    return sum(not same_shape(m.region.entry, m.region.exit) for m in (*a.members, *b.members)) > 1


def _shared_path(first: str, last: str) -> str:
    """("h.0", "h.3") -> "h.0..3"."""
    shared = 0
    for a, b in zip(first.split("."), last.split("."), strict=False):
        if a != b:
            break
        shared += 1
    return f"{first}..{'.'.join(last.split('.')[shared:])}"
