"""Which inputs' values enter each node of a graph, and which lengths; read off two runs at other sizes.

A graph that was loaded from a file says nothing of its shapes, and sizes stand in it as numbers that operators take of
any tensor at hand: of which dimension one is shows where both runs are compared.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature

aten = torch.ops.aten

# A size in both runs
Pair = tuple[int, int]

ROWS: Pair = (2, 3)
# Of one length after the other: no two are alike, nor their halves, nor what is left of them after a small kernel
_LENGTHS: tuple[Pair, ...] = ((7, 11), (5, 8), (13, 17), (19, 23), (29, 31))


@dataclass(frozen=True, kw_only=True)
class Entered:
    """Of each node: the names of the inputs whose `values` enter it, and of the lengths whose `sizes` do, by numbers or
    as what something is as long as; and its value in each of two `runs`. `pairs`: the free dimensions' sizes in both.
    """

    graph_module: fx.GraphModule
    values: Mapping[fx.Node, frozenset[str]]
    sizes: Mapping[fx.Node, frozenset[str]]
    runs: tuple[Mapping[fx.Node, Any], Mapping[fx.Node, Any]]
    pairs: Mapping[str, Pair]

    def shape(self, node: fx.Node) -> tuple[Pair, ...]:
        """Of a tensor, in both runs."""
        one, other = (run[node] for run in self.runs)
        return tuple(zip(one.shape, other.shape, strict=True))

    def number(self, node: fx.Node) -> Pair | None:
        """Of a size, in both runs; None for what is no whole number."""
        one, other = (run[node] for run in self.runs)
        return (one, other) if isinstance(one, int) and isinstance(other, int) else None

    def is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.runs[0][node], torch.Tensor)

    def length_of(self, pair: Pair) -> str | None:
        """The name of the length that has these sizes."""
        return next((name for name, sizes in self.pairs.items() if sizes == pair and pair != ROWS), None)


def what_enters(graph_module: fx.GraphModule, signature: Signature) -> Entered:
    """Raises PassRefused where the network doesn't run at two sizes of each of its free dimensions."""
    pairs = dict(_sizes(signature))
    device = next((str(p.device) for p in graph_module.parameters()), "cpu")
    with evaluating(graph_module):
        try:
            one, other = (
                record(graph_module, signature.random_inputs({n: p[at] for n, p in pairs.items()}, device=device))
                for at in (0, 1)
            )
        except (RuntimeError, IndexError) as error:
            told = ", ".join(f"{name} {sizes}" for name, sizes in pairs.items())
            raise PassRefused(f"the network does not run at the sizes {told}: {error}.") from error
    lengths = {s.name: frozenset(d for d in s.shape if d in pairs and pairs[d] != ROWS) for s in signature.inputs}
    found = Entered(graph_module=graph_module, values={}, sizes={}, runs=(one, other), pairs=pairs)
    values: dict[fx.Node, frozenset[str]] = {}
    sizes: dict[fx.Node, frozenset[str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node], sizes[node] = frozenset([str(node.target)]), frozenset()
            continue
        behind = node.all_input_nodes
        if node.target is aten.sym_size.int:
            (tensor,) = behind
            pair = found.number(node)
            length = None if pair is None else found.length_of(pair)
            values[node] = frozenset()
            if pair == ROWS:
                sizes[node] = frozenset()
            elif length is not None:
                sizes[node] = frozenset([length])
            else:
                sizes[node] = sizes[tensor].union(*(lengths[name] for name in values[tensor]))
            continue
        values[node] = frozenset().union(*(values[i] for i in behind))
        sizes[node] = frozenset().union(*(sizes[i] for i in behind))
    return Entered(graph_module=graph_module, values=values, sizes=sizes, runs=(one, other), pairs=pairs)


def _sizes(signature: Signature) -> Iterator[tuple[str, Pair]]:
    """Two sizes of each free dimension. Raises PassRefused where its bounds allow no two."""
    lengths = iter(_LENGTHS)
    for name in signature.symbols:
        wanted = ROWS if name.startswith("batch") else next(lengths, None)
        if wanted is None:
            raise PassRefused(f"expected at most {len(_LENGTHS)} lengths, found {', '.join(signature.symbols)}.")
        one, other = (signature.within({name: size})[name] for size in wanted)
        if one == other:
            raise PassRefused(f"{name} is {one} alone: nothing tells what else is as long.")
        yield name, (one, other)
