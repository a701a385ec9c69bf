"""Which regions are parts: maximal repeated isomorphic regions, or what the user's globs name.

The backbone's segments are compared by signature; the run of repeats that covers most linear maps wins, so twelve
GPT-2 blocks (an attention half and an MLP half each) become twelve parts. Where exact repeats cover little, as in a
convnet whose stages change width, segments with the same kinds of operators count as alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import fx

from thesean.errors import PlanError, unknown_name
from thesean.passes.finest import finest_regions
from thesean.passes.flow import Flow, Vertex
from thesean.passes.graph import owner
from thesean.passes.regions import (
    VIEWS,
    Region,
    branches,
    chains,
    is_linear_map,
    is_single_entry_single_exit,
    join,
    module_regions,
    segments_of,
    shared_path,
)

aten = torch.ops.aten
Granularity = Literal["block", "sublayer", "finest"]
GRANULARITIES: tuple[Granularity, ...] = ("block", "sublayer", "finest")

# repeats that cover less than this share of the heavy segments are a coincidence, not the model's structure
_COVERAGE = 0.6
# a segment with fewer nodes holds no two residual blocks
_SMALLEST_NEST = 8


@dataclass(frozen=True, kw_only=True)
class NamedRegion:
    path: str
    region: Region


def partition(flow: Flow, granularity: Granularity = "block", parts: Sequence[str] | None = None) -> list[NamedRegion]:
    """Disjoint regions in order. Raises PlanError when nothing can be cut out or a glob matches nothing."""
    if granularity not in GRANULARITIES:
        raise PlanError(f"unknown granularity {granularity!r}; expected 'block', 'sublayer' or 'finest'.")
    if parts is not None:
        return _explicit(flow, parts)
    blocks = [b for b in find_blocks(flow) if _carries_tensors(b)]
    if granularity != "block":
        blocks = [half for block in blocks for half in _halves(flow, block)]
    if granularity == "finest":
        blocks = [piece for half in blocks for piece in finest_regions(flow, half)]
    if not blocks:
        raise PlanError(
            "found no repeated single-entry single-exit region with a linear map. Name the parts yourself: "
            f"parts=[...]; modules that can be cut out: {', '.join(module_regions(flow)) or 'none'}."
        )
    return _named(blocks)


def _carries_tensors(region: Region) -> bool:
    """Entry and exit are one tensor each; a node with several outputs (an LSTM's tuple) can't be either."""
    return all(isinstance(n.meta.get("val"), torch.Tensor) for n in (region.entry, region.exit))


def halves(flow: Flow, region: Region) -> list[Region]:
    """The residual branches inside a region, in order; empty when it has none."""
    return [b for s in segments_of(flow, region) if s.is_fork() for b in branches(flow, s)]


def _halves(flow: Flow, block: Region) -> list[Region]:
    return halves(flow, block) or [block]


def find_blocks(flow: Flow, within: Region | None = None) -> list[Region]:
    """Disjoint single-entry single-exit regions, in order: repeats first, then what is like them, then lone residuals.

    Each chain (`regions.chains`) is searched for runs of isomorphic groups of segments; the same groups are looked for
    in the other chains; what is left over and residual is a part of its own, unless smaller repeats are inside of it.
    """
    rows = chains(flow, within)
    forked = any(s.is_fork() and s.is_heavy() for row in rows for s in row)
    taken: list[set[int]] = [set() for _ in rows]
    found: list[Region] = []
    forms: dict[tuple[object, ...], int] = {}

    def take(number: int, start: int, period: int) -> None:
        row = rows[number]
        taken[number].update(range(start, start + period))
        found.append(join(row[start], row[start + period - 1], row[start + 1 : start + period - 1]))

    for number, row in enumerate(rows):
        for start, period, count in _repeats(row, forked):
            for at in range(start, start + period * count, period):
                take(number, at, period)
                forms[tuple(exact_signature(s) for s in row[at : at + period])] = period
    for number, row in enumerate(rows):
        exact = [exact_signature(s) for s in row] if forms else []
        for at in range(len(row)):
            for form, period in forms.items():
                if tuple(exact[at : at + period]) == form and taken[number].isdisjoint(range(at, at + period)):
                    take(number, at, period)
    for number, row in enumerate(rows):
        whole = not taken[number]  # a chain without repeats: any heavy fork; else what is surely a block
        for at, segment in enumerate(row):
            lone = at not in taken[number] and (segment.is_residual() or (whole and segment.is_fork()))
            if lone and segment.is_heavy():
                inner = find_blocks(flow, segment) if len(segment.nodes) > _SMALLEST_NEST else []
                several = len(inner) > 1 and all(_has_residual(flow, b) for b in inner)
                found.extend(inner if several else [segment])
    found = [r for r in found if is_single_entry_single_exit(flow, r)]  # a value inside may leave by another output
    if not found and within is None and rows:  # every linear map but the last, the head
        heavy = [s for s in max(rows, key=len) if s.is_heavy()][:-1]
        found = [s for s in heavy if is_single_entry_single_exit(flow, s)]
    return sorted(found, key=lambda r: flow.order[r.exit])


def _has_residual(flow: Flow, block: Region) -> bool:
    return any(s.is_residual() for s in segments_of(flow, block))


def _repeats(row: list[Region], forked: bool) -> list[tuple[int, int, int]]:
    """(start, period, count) of the runs that cover most of a chain, by exact repeats or by kinds of operators."""
    weight = [s.is_heavy() and (s.is_fork() or not forked) for s in row]
    if sum(weight) < 2:
        return []
    most, best = 0, []
    for signature in (exact_signature, _kinds):
        ids: dict[object, int] = {}
        signatures = [ids.setdefault(signature(s), len(ids)) for s in row]
        runs = _tandem_runs(signatures, weight)
        covered = sum(weight[i] for start, period, count in runs for i in range(start, start + period * count))
        # the head of a plain network is heavy and never repeats
        if covered > most and covered >= _COVERAGE * max(1, sum(weight) - (not forked)):
            most, best = covered, runs
    return best


def _tandem_runs(signatures: list[int], weight: list[bool], offset: int = 0) -> list[tuple[int, int, int]]:
    """(start, period, count) of disjoint repeats, in order: the one with most weight first, then the rest."""
    best: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    size = len(signatures)
    total = sum(weight)
    for period in range(1, size // 2 + 1):
        start = 0
        while start + 2 * period <= size:
            if not weight[start]:
                start += 1
                continue
            end = start + period
            while end < size and signatures[end] == signatures[end - period]:
                end += 1
            count = (end - start) // period
            if count >= 2:
                score = sum(weight[start : start + period * count])
                key = (score, -period, -start)
                if best is None or key > best[0]:
                    best = (key, (start, period, count))
                start += period * (count - 1)
            start += 1
        if best is not None and best[0][0] == total:
            break  # a longer period can't cover more
    if best is None:
        return []
    start, period, count = best[1]
    stop = start + period * count
    return [
        *_tandem_runs(signatures[:start], weight[:start], offset),
        (start + offset, period, count),
        *_tandem_runs(signatures[stop:], weight[stop:], offset + stop),
    ]


def exact_signature(segment: Region) -> object:
    """Operators, shapes and wiring."""
    index: dict[fx.Node, int] = {segment.entry: -1} | {n: i for i, n in enumerate(segment.nodes)}
    rows = []
    for node in segment.nodes:
        wires = tuple(index.get(i, _outside(i)) for i in node.all_input_nodes)
        rows.append((str(node.target), _shape(node), wires))
    return tuple(rows)


def _kinds(segment: Region) -> object:
    """The set of operators that compute, whatever their number and sizes."""
    return frozenset(str(n.target) for n in segment.nodes if n.target not in VIEWS)


def _outside(node: fx.Node) -> object:
    return ("parameter", _shape(node)) if node.op == "get_attr" else "side"


def _shape(node: fx.Node) -> tuple[object, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    # the expression itself: printing it would take longer than all the rest of a signature
    return tuple(d.node.expr if isinstance(d, torch.SymInt) else d for d in value.shape)


def _explicit(flow: Flow, globs: Sequence[str]) -> list[NamedRegion]:
    """The outermost modules that each glob matches."""
    candidates = module_regions(flow)
    chosen: dict[str, Region] = {}
    for glob in globs:
        matches = [path for path in candidates if fnmatchcase(path, glob)]
        if not matches:
            raise PlanError(f"parts: {no_match(glob, candidates)}")
        outermost = [p for p in matches if not any(p.startswith(o + ".") for o in matches)]
        chosen.update({p: candidates[p] for p in outermost})
    ordered = sorted(chosen.items(), key=lambda item: flow.order[item[1].exit])
    taken: dict[fx.Node, str] = {}
    for path, region in ordered:
        for node in region.nodes:
            if node in taken:
                raise PlanError(f"parts {taken[node]!r} and {path!r} overlap; name only one of them.")
            taken[node] = path
    return [NamedRegion(path=p, region=r) for p, r in ordered]


def matches(path: str, glob: str) -> bool:
    """A glob names a part by its path, or by that of a module around it: "h.0" is all halves of h.0."""
    above = [path[:at] for at, letter in enumerate(path) if letter in ".#" and path[:at]]
    return any(fnmatchcase(p, glob) or p == glob for p in (path, *above))


def no_match(glob: str, paths: object) -> str:
    """The glob, what there is, and the nearest name."""
    return str(unknown_name("part", glob, list(paths) or ["none"])).replace("unknown part", "no part matches")  # type: ignore[call-overload]


def inner_names(path: str, inner: Sequence[Region]) -> list[str]:
    """Names for regions inside of the part `path`: as `partition` would give them, with the part's #2 kept."""
    _, sign, call = path.partition("#")
    return [n.path + sign + call if n.path.rpartition("#")[0] == "" else n.path for n in _named(list(inner))]


def _named(regions: list[Region]) -> list[NamedRegion]:
    """Module paths as names; where two regions share one, the modules that they span tell them apart.

    A module that is called again gives the same name with #2, #3...
    """
    paths = [r.path() for r in regions]
    prefixes = {path[:end] for path in paths for end in range(len(path)) if path[end] == "."}
    owners = [tuple(dict.fromkeys(o for n in r.nodes if (o := owner(n)))) for r in regions]
    spans: dict[str, set[tuple[str, ...]]] = {}
    for path, owned in zip(paths, owners, strict=True):
        spans.setdefault(path, set()).add(owned)
    named, used = [], Counter[str]()
    for region, path, owned in zip(regions, paths, owners, strict=True):
        if owned and (not path or len(spans[path]) > 1 or path in prefixes):
            inner = [o.removeprefix(path).lstrip(".") for o in owned if o != path]
            span = inner[0] if len(inner) == 1 else f"{inner[0]}..{inner[-1]}" if inner else ""
            path = ".".join(p for p in (path, span) if p)
        path = path or "region"
        used[path] += 1
        named.append(NamedRegion(path=path if used[path] == 1 else f"{path}#{used[path]}", region=region))
    return named


def read_by_several(flow: Flow) -> list[tuple[str, fx.Node]]:
    """(module path, last node) of each residual branch that reads more than one hidden state: no part, for a target has
    one input. An attention of a decoder over its encoder's output is one.
    """
    found = []
    for total in flow.order:
        if total not in flow.dag or total.target is not aten.add.Tensor or total in flow.links_back:
            continue
        streams = [i for i in total.all_input_nodes if i in flow.dag]
        if len(streams) != 2:
            continue
        stream, end = sorted(streams, key=flow.order.__getitem__)
        inside, front = {end}, [end]
        entries: set[Vertex] = set()
        while front:
            for above in flow.dag.predecessors(front.pop()):
                if isinstance(above, str) or flow.order[above] <= flow.order[stream]:
                    entries.add(above)
                elif above not in inside:
                    inside.add(above)
                    front.append(above)
        if stream in entries and len(entries) > 1 and any(is_linear_map(n) for n in inside):
            found.append((shared_path(inside), end))
    return found
