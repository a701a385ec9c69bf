"""Blocks by name: modules of one list, `blocks.0`, `blocks.1`, ..., that stand one after another.

Whoever wrote the network said where its blocks begin and end. Operators that repeat say it as well, and better where a
block is no module of its own; but in a convnet whose blocks change width, stride and skip connection, what repeats may
begin in the middle of one block and end in the middle of the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.regions import Region, is_linear_map, is_work, module_regions

# one linear map is a layer, which its activation may stand beside
_FEWEST_MAPS = 2
# siblings that hold less than this share of what the repeats hold are a detail of the network, not its backbone
_COVERAGE = 0.6


def mend(flow: DataFlow, rows: Sequence[Sequence[Region]], blocks: list[Region]) -> list[Region]:
    """The blocks as they are, where no sibling is cut through or left out in part; else the siblings, and of the blocks
    those residual ones that are beside all of them.
    """
    named = siblings(flow, rows)
    if not named or all(_respected(s, blocks) for s in named):
        return blocks
    inside = {n for s in named for n in s.nodes}
    if len(_work(named)) < _COVERAGE * len(_work(blocks)):
        return blocks
    return [*named, *(b for b in blocks if inside.isdisjoint(b.nodes) and b.is_residual())]


def siblings(flow: DataFlow, rows: Sequence[Sequence[Region]]) -> list[Region]:
    """The innermost modules named by a number that are runs of a chain's segments, and of which there are several."""
    place = {cut: number for number, row in enumerate(rows) for s in row for cut in (s.entry, s.exit)}
    found = {
        path: region
        for path, region in module_regions(flow).items()
        if path.partition("#")[0].rpartition(".")[2].isdigit()
        and region.entry in place
        and place.get(region.exit) == place[region.entry]
        and sum(is_linear_map(n) for n in region.nodes) >= _FEWEST_MAPS
    }
    inner = {p: r for p, r in found.items() if not any(o.startswith(f"{p.partition('#')[0]}.") for o in found)}
    families = Counter(_family(path) for path in inner)
    several = {p: r for p, r in inner.items() if families[_family(p)] > 1}
    return [replace(region, name=path.partition("#")[0]) for path, region in several.items()]


def _family(path: str) -> str:
    """ "stages.*.layers.*" for "stages.0.layers.1"."""
    return ".".join("*" if name.isdigit() else name for name in path.partition("#")[0].split("."))


def _work(regions: Sequence[Region]) -> set[fx.Node]:
    return {n for r in regions for n in r.nodes if is_work(n)}


def _respected(sibling: Region, blocks: Sequence[Region]) -> bool:
    """Inside of one block, or all its work in blocks inside of it."""
    own = set(sibling.nodes)
    if any(own.issubset(b.nodes) for b in blocks):
        return True
    return _work([sibling]) <= _work([b for b in blocks if own.issuperset(b.nodes)])
