"""Fewer target parts than guide parts: neighbours become one part, the most alike first.

N examples (tokens of a sequence, images of a batch), P features
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.errors import DataError, NumericalError, PlanError
from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.regions import Region, is_linear_map, same_shape, span
from thesean.passes.plan.partition import NamedRegion
from thesean.similarity import similarity

# CKA's cost grows with the square of the examples or of the features; neighbours are told apart by far fewer
_MAX_EXAMPLES, _MAX_FEATURES = 1024, 4096


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
    flow: DataFlow, chosen: Sequence[NamedRegion], target_parts: int, values: dict[fx.Node, Any]
) -> list[Group]:
    """Merge the neighbours whose outputs are most alike until `target_parts` are left.

    Alike is the unbiased linear CKA (Kornblith et al. 2019) between the activations at the ends of two neighbours: the
    second one changed little. `values` are every node's on example inputs. Raises PlanError when that many can't be
    reached.
    """
    if not 1 <= target_parts <= len(chosen):
        raise PlanError(f"target_parts: expected 1 to {len(chosen)}, the parts that there are, found {target_parts}.")
    groups = singles(chosen)
    known: dict[tuple[fx.Node, fx.Node], float] = {}

    def alike(a: Group, b: Group) -> float:
        key = (a.region.exit, b.region.exit)
        if key not in known:
            known[key] = _cka(values[key[0]], values[key[1]])
        return known[key]

    while len(groups) > target_parts:
        pairs = [(a, b, _join(flow, a, b)) for a, b in itertools.pairwise(groups)]
        mergeable = [(alike(a, b), i) for i, (a, b, joined) in enumerate(pairs) if joined is not None]
        if not mergeable:
            raise PlanError(
                f"target_parts={target_parts}: no more than down to {len(groups)} parts can be merged; the others do "
                "not follow each other, or change the shape twice."
            )
        _, at = max(mergeable, key=lambda pair: (pair[0], -pair[1]))
        joined = pairs[at][2]
        assert joined is not None
        groups[at : at + 2] = [joined]
    return groups


def regroup(flow: DataFlow, chosen: Sequence[NamedRegion], members: Sequence[Sequence[str]]) -> list[Group]:
    """The groups of a written plan. Raises PlanError when its members don't follow each other."""
    by_path = {c.path: c for c in chosen}
    groups = []
    for paths in members:
        group = singles([by_path[paths[0]]])[0]
        for path in paths[1:]:
            joined = _join(flow, group, singles([by_path[path]])[0])
            if joined is None:
                raise PlanError(f"parts {group.path!r} and {path!r} can't be merged. Make a new plan.")
            group = joined
        groups.append(group)
    return groups


def most_changing(group: Group, values: dict[fx.Node, Any]) -> NamedRegion:
    """The member to keep where the others are dropped: one that changes the shape, or else the activations most."""
    shaping = [m for m in group.members if not same_shape(m.region.entry, m.region.exit)]
    if shaping:
        return shaping[0]
    return min(group.members, key=lambda m: _cka(values[m.region.entry], values[m.region.exit]))


def _join(flow: DataFlow, a: Group, b: Group) -> Group | None:
    """Both as one part; None where other data comes in between, or where both change the shape."""
    if sum(not same_shape(m.region.entry, m.region.exit) for m in (*a.members, *b.members)) > 1:
        return None
    region = span(flow, a.region, b.region)
    if region is None:
        return None
    inside = {*a.region.nodes, *b.region.nodes}
    if any(is_linear_map(n) for n in region.nodes if n not in inside):
        return None  # a part that was not chosen lies in between
    return Group(path=_shared_path(a.members[0].path, b.members[-1].path), region=region, members=a.members + b.members)


def _shared_path(first: str, last: str) -> str:
    """("h.0", "h.3") -> "h.0..3"."""
    shared = 0
    for a, b in zip(first.split("."), last.split("."), strict=False):
        if a != b:
            break
        shared += 1
    return f"{first}..{'.'.join(last.split('.')[shared:])}"


@torch.no_grad()
def _cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of activations at two places on the same examples; where it can't be told they count as unlike."""
    first, second = _rows(x), _rows(y)
    if first.shape[0] != second.shape[0]:  # another resolution: only whole images correspond
        first, second = x.flatten(1), y.flatten(1)
    step = -(-first.shape[0] // _MAX_EXAMPLES)
    first, second = (v[::step, :: -(-v.shape[1] // _MAX_FEATURES)].float() for v in (first, second))
    try:
        return float(similarity(first, second, "cka"))
    except (DataError, NumericalError):
        return 0.0


def _rows(value: torch.Tensor) -> torch.Tensor:
    """(N, P): every token or pixel is an example."""
    if value.ndim == 4:
        return value.permute(0, 2, 3, 1).flatten(0, 2)
    return value.flatten(0, 1) if value.ndim == 3 else value.flatten(1)
