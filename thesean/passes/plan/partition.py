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
from thesean.passes.analyse.blocks import carries_tensors, find_blocks, halves_or_whole
from thesean.passes.analyse.dataflow import DataFlow, Vertex
from thesean.passes.analyse.regions import Region, is_linear_map, module_regions, shared_path
from thesean.passes.analyse.smallest_regions import smallest_regions
from thesean.passes.graph.nodes import owner

aten = torch.ops.aten
Granularity = Literal["block", "sublayer", "finest"]
GRANULARITIES: tuple[Granularity, ...] = ("block", "sublayer", "finest")


@dataclass(frozen=True, kw_only=True)
class NamedRegion:
    path: str
    region: Region


def partition(
    flow: DataFlow, granularity: Granularity = "block", parts: Sequence[str] | None = None
) -> list[NamedRegion]:
    """Disjoint regions in order. Raises PlanError when nothing can be cut out or a glob matches nothing."""
    if granularity not in GRANULARITIES:
        raise PlanError(f"unknown granularity {granularity!r}; expected 'block', 'sublayer' or 'finest'.")
    if parts is not None:
        return _explicit(flow, parts)
    blocks = [b for b in find_blocks(flow) if carries_tensors(b)]
    if granularity != "block":
        blocks = [half for block in blocks for half in halves_or_whole(flow, block)]
    if granularity == "finest":
        blocks = [piece for half in blocks for piece in smallest_regions(flow, half)]
    if not blocks and (cells := [path for path, _ in read_twice(flow) if path]):
        raise PlanError(
            f"found no part: {', '.join(cells[:3])} return a last state that is read beside the output, and a target "
            "has one output. Return the output alone: a converted network carries its own state, and its file takes "
            "and returns it."
        )
    if not blocks:
        raise PlanError(
            "found no repeated single-entry single-exit region with a linear map. Name the parts yourself: "
            f"parts=[...]; modules that can be cut out: {', '.join(module_regions(flow)) or 'none'}."
        )
    return _named(blocks)


def _explicit(flow: DataFlow, globs: Sequence[str]) -> list[NamedRegion]:
    """The outermost modules that each glob matches."""
    candidates = module_regions(flow)
    chosen: dict[str, Region] = {}
    for glob in globs:
        matches = [path for path in candidates if path == glob or fnmatchcase(path, glob)]
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


def read_by_several(flow: DataFlow) -> list[tuple[str, fx.Node]]:
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


def read_twice(flow: DataFlow) -> list[tuple[str, fx.Node]]:
    """(module path, node) of each recurrent cell that more than one of its outputs is read of: no part, for a target
    has one output.
    """
    found = []
    for node in flow.order:
        several = isinstance(node.meta.get("val"), (tuple, list)) and is_linear_map(node)
        if node in flow.dag and several and len(list(flow.dag.successors(node))) > 1:
            found.append((owner(node), node))
    return found
