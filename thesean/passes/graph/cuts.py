"""Where to cut a network into regions that a backward computes anew: activation checkpointing.

What is held at once are the values that cross the cuts, and the activations of one region, the largest:
held = sum of what crosses + max over regions of what its backward keeps (Chen et al. 2016, arXiv 1604.06174, sec. 4).
Few long regions cross little and keep much, many short ones the other way round.

Both are measured, by a forward that hands nothing on to a backward: the graph alone doesn't tell what a module keeps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

# Of the places where least crosses, so many are tried: two in each of a hundred blocks.
_PLACES = 200

# Regions are bounded by the whole, divided by these.
_BOUNDS = tuple(2 ** (k / 3) for k in range(1, 31))


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Regions end after the nodes of these names, in the graph's order; the first one needs no backward, and the last
    one's comes first: both are run as they are. `held` bytes are what a backward keeps at once, `without` cuts so many.
    """

    after: tuple[str, ...]
    held: int
    without: int


class _Value(NamedTuple):
    """Bytes of a storage, and nodes by their places: the one that it is `born` at, the first whose backward keeps it,
    and the last that reads it.
    """

    size: int
    born: int
    kept: int
    read: int


def find_cuts(graph_module: fx.GraphModule, inputs: Mapping[str, torch.Tensor]) -> Cuts:
    """The cuts with which least is held, none where they gain nothing. Modules' buffers and the random state are as
    after a forward.
    """
    values, nodes = _measured(graph_module, inputs)
    kept = [v for v in values if v.kept < len(nodes)]
    without = sum(v.size for v in kept)
    best = Cuts(after=(), held=without, without=without)
    crossing = _crossing(values, len(nodes))
    start = max(0, min((v.kept for v in kept), default=1) - 1)  # what comes before keeps nothing
    while start and crossing[start - 1] < crossing[start]:
        start -= 1
    given = sum(v.size for v in values if v.born <= start and (v.kept < len(nodes) or v.read > start))
    places = _places(crossing, start)
    table = _table(values, places)
    for bound in _BOUNDS:
        found = _cheapest(table, without / bound)
        if found is None:
            break
        held, chain = found
        if given + held < best.held:
            best = Cuts(after=tuple(nodes[places[at]] for at in chain), held=given + held, without=without)
    return best


def _crossing(values: list[_Value], count: int) -> list[int]:
    """Bytes that are read after each node, and not made after it."""
    found = [0] * (count + 1)
    for v in values:
        if v.read > v.born:
            found[v.born] += v.size
            found[v.read] -= v.size
    return list(accumulate(found))[:count]


def _places(crossing: list[int], start: int) -> list[int]:
    """`start`, the nodes after which least crosses, and the last one."""
    inner = range(start + 1, len(crossing) - 1)
    narrow = [at for at in inner if crossing[at] < crossing[at - 1] or crossing[at] <= crossing[at + 1]]
    return [start, *sorted(sorted(narrow, key=crossing.__getitem__)[:_PLACES]), len(crossing) - 1]


_Table = list[list[tuple[int, int]]]


def _table(values: list[_Value], places: list[int]) -> _Table:
    """Of each region, `[end][begin]` by numbers of places: bytes that it keeps, and that cross its end anew."""
    found: _Table = []
    after = [(v, bisect_left(places, v.born) - 1) for v in values]  # the last place before it
    for end, place in enumerate(places):
        kept, crossing = [0] * (end + 1), [0] * (end + 1)
        for v, begin in after:
            if 0 <= begin < end:
                kept[begin] += v.size if v.kept <= place else 0
                crossing[begin] += v.size if v.read > place else 0
        for begin in range(end - 2, -1, -1):
            kept[begin] += kept[begin + 1]
            crossing[begin] += crossing[begin + 1]
        found.append(list(zip(kept, crossing, strict=True))[:end])
    return found


def _cheapest(table: _Table, most: float) -> tuple[int, list[int]] | None:
    """Bytes held, and the places to cut at, where no region keeps more than `most` and least crosses in all; None where
    a region must keep more.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # what crosses up to a place, and the place before it
    for row in table[1:]:
        ways = [(best[b][0] + cross, b) for b, (kept, cross) in enumerate(row) if kept <= most and best[b][1] >= 0]
        best.append(min(ways, default=(0, -1)))
    at, largest, chain = len(table) - 1, 0, []
    if best[at][1] < 0:
        return None
    while at > 0:
        before = best[at][1]
        largest = max(largest, table[at][before][0])
        at = before
        chain.append(at)
    return best[-1][0] + largest, chain[::-1]


def _measured(graph_module: fx.GraphModule, inputs: Mapping[str, torch.Tensor]) -> tuple[list[_Value], list[str]]:
    run = _Measuring(graph_module)
    given = [inputs[str(n.target)] for n in graph_module.graph.find_nodes(op="placeholder")]
    with torch.enable_grad():
        run.run(*given, enable_io_processing=False)
    names = [n.name for n in graph_module.graph.nodes if n.op != "output"]
    last = len(names)
    found = [
        _Value(size, born, run.kept.get(ref, last), run.read.get(ref, born)) for ref, (size, born) in run.born.items()
    ]
    return found, names


class _Measuring(fx.Interpreter):
    """Runs a graph and notes when each storage is born, kept for a backward, and read; keeps none for a backward."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self._at = {node: at for at, node in enumerate(graph_module.graph.nodes)}
        # weak references keep a storage's number from being given to another
        self._free = set(_storages([*graph_module.parameters(), *graph_module.buffers()]))
        self.born: dict[StorageWeakRef, tuple[int, int]] = {}
        self.kept: dict[StorageWeakRef, int] = {}
        self.read: dict[StorageWeakRef, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        at, packed = self._at[n], dict[StorageWeakRef, int]()

        def pack(tensor: torch.Tensor) -> None:
            packed.update(_storages([tensor]))

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: torch.empty(0)):
            value = super().run_node(n)
        own = _storages(pytree.tree_leaves(value))
        if n.op in ("placeholder", "get_attr"):
            self._free.update(own)
        for ref, size in (*packed.items(), *own.items()):
            if ref not in self._free:
                self.born.setdefault(ref, (size, at))
        for ref in packed:
            self.kept.setdefault(ref, at)
        if n.op != "output":  # what is put out is held by whoever asked
            for source in n.all_input_nodes:
                for ref in _storages(pytree.tree_leaves(self.env[source])):
                    self.read[ref] = at
        return value


def _storages(values: Iterable[Any]) -> dict[StorageWeakRef, int]:
    """Their bytes."""
    held = [v.untyped_storage() for v in values if isinstance(v, torch.Tensor)]
    return {StorageWeakRef(storage): storage.nbytes() for storage in held}
