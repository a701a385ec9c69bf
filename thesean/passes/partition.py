"""Which regions are parts: maximal repeated isomorphic regions, or what the user's globs name.

The backbone's segments are compared by signature; the run of repeats that covers most linear maps wins, so twelve
GPT-2 blocks (an attention half and an MLP half each) become twelve parts. Where exact repeats cover little, as in a
convnet whose stages change width, segments with the same kinds of operators count as alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import fx

from thesean.errors import PlanError, unknown_name
from thesean.passes.flow import Flow
from thesean.passes.graph import owner
from thesean.passes.regions import Region, branches, join, module_regions, segments

aten = torch.ops.aten
Granularity = Literal["block", "sublayer"]

# moves or renames values without computing: no part of a segment's character
_VIEWS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.contiguous.default, aten.clone.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.t.default, aten.flatten.using_ints,
    aten._unsafe_view.default, aten.alias.default, aten.select.int, aten.cat.default,
}  # fmt: skip

# repeats that cover less than this share of the heavy segments are a coincidence, not the model's structure
_COVERAGE = 0.6


@dataclass(frozen=True, kw_only=True)
class NamedRegion:
    path: str
    region: Region


def partition(flow: Flow, granularity: Granularity = "block", parts: Sequence[str] | None = None) -> list[NamedRegion]:
    """Disjoint regions in order. Raises PlanError when nothing can be cut out or a glob matches nothing."""
    if granularity not in ("block", "sublayer"):
        raise PlanError(f"unknown granularity {granularity!r}; expected 'block' or 'sublayer'.")
    if parts is not None:
        return _explicit(flow, parts)
    blocks = [b for b in repeated_blocks(segments(flow)) if _carries_tensors(b)]
    if granularity == "sublayer":
        blocks = [half for block in blocks for half in _halves(flow, block)]
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
    inside = set(region.nodes)
    return [b for s in segments(flow) if s.exit in inside and s.is_fork() for b in branches(flow, s)]


def _halves(flow: Flow, block: Region) -> list[Region]:
    return halves(flow, block) or [block]


def repeated_blocks(chain: list[Region]) -> list[Region]:
    """Maximal runs of isomorphic segment groups, joined to one region a repeat."""
    heavy = [s.is_heavy() for s in chain]
    most, best = 0, None
    for signature in (_exact, _kinds):
        signatures = [signature(s) for s in chain]
        runs = _tandem_runs(chain, signatures, heavy)
        covered = sum(heavy[i] for start, period, count in runs for i in range(start, start + period * count))
        if covered > most and covered >= _COVERAGE * max(1, sum(heavy) - 1):  # the head is heavy and never repeats
            most, best = covered, runs
    if best:
        return [
            join(chain[at], chain[at + period - 1], chain[at + 1 : at + period - 1])
            for start, period, count in best
            for at in range(start, start + period * count, period)
        ]
    # nothing repeats: every residual segment by itself, else every linear map but the last, the head
    forks = [s for s in chain if s.is_fork() and s.is_heavy()]
    return forks or [s for s in chain if s.is_heavy()][:-1]


def _tandem_runs(chain: list[Region], signatures: list[object], heavy: list[bool]) -> list[tuple[int, int, int]]:
    """(start, period, count) of disjoint repeats, in order: the one with most heavy segments first, then the rest."""
    best: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    size = len(chain)
    forked = any(s.is_fork() and h for s, h in zip(chain, heavy, strict=True))
    for period in range(1, size // 2 + 1):
        start = 0
        while start + 2 * period <= size:
            opens = heavy[start] and (chain[start].is_fork() or not forked)
            if not opens:
                start += 1
                continue
            end = start + period
            while end < size and signatures[end] == signatures[end - period]:
                end += 1
            count = (end - start) // period
            if count >= 2:
                score = sum(heavy[start : start + period * count])
                key = (score, -period, -start)
                if best is None or key > best[0]:
                    best = (key, (start, period, count))
                start += period * (count - 1)
            start += 1
    if best is None:
        return []
    start, period, count = best[1]
    stop = start + period * count
    left = _tandem_runs(chain[:start], signatures[:start], heavy[:start])
    right = _tandem_runs(chain[stop:], signatures[stop:], heavy[stop:])
    shift = [(s + stop, p, c) for s, p, c in right]
    return [*left, best[1], *shift]


def _exact(segment: Region) -> object:
    """Operators, shapes and wiring."""
    index: dict[fx.Node, int] = {segment.entry: -1} | {n: i for i, n in enumerate(segment.nodes)}
    rows = []
    for node in segment.nodes:
        wires = tuple(index.get(i, _outside(i)) for i in node.all_input_nodes)
        rows.append((str(node.target), _shape(node), wires))
    return tuple(rows)


def _kinds(segment: Region) -> object:
    """The set of operators that compute, whatever their number and sizes."""
    return frozenset(str(n.target) for n in segment.nodes if n.target not in _VIEWS)


def _outside(node: fx.Node) -> object:
    return ("parameter", _shape(node)) if node.op == "get_attr" else "side"


def _shape(node: fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return tuple(str(d) for d in value.shape) if isinstance(value, torch.Tensor) else ()


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


def no_match(glob: str, paths: object) -> str:
    """The glob, what there is, and the nearest name."""
    return str(unknown_name("part", glob, list(paths) or ["none"])).replace("unknown part", "no part matches")  # type: ignore[call-overload]


def _named(regions: list[Region]) -> list[NamedRegion]:
    """Module paths as names; where two regions share one, the modules that they span tell them apart."""
    paths = [r.path() for r in regions]
    named, used = [], set()
    for region, path in zip(regions, paths, strict=True):
        owners = [owner(n) for n in region.nodes if owner(n)]
        enclosing = not path or paths.count(path) > 1 or any(p.startswith(path + ".") for p in paths)
        if enclosing and owners and (path or owners[0]):
            inner = list(dict.fromkeys(o.removeprefix(path).lstrip(".") for o in owners if o != path))
            span = inner[0] if len(inner) == 1 else f"{inner[0]}..{inner[-1]}" if inner else ""
            path = ".".join(p for p in (path, span) if p)
        path = path or "region"
        unique, n = path, 1
        while unique in used:
            n += 1
            unique = f"{path}#{n}"
        used.add(unique)
        named.append(NamedRegion(path=unique, region=region))
    return named
