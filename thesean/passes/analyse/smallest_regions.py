"""The finest parts: every smallest single-entry single-exit region that holds a linear map.

An attention's query, key and value share an entry and meet in one product: they stay together up to it, and the output
projection is a part of its own; so are the two maps of an MLP, the first with its activation.
"""

from __future__ import annotations

import itertools

import networkx as nx
import torch
from torch import fx

from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.regions import Region, is_linear_map


def smallest_regions(flow: DataFlow, region: Region) -> list[Region]:
    """Disjoint regions that make up `region`, in order; the region itself where nothing smaller can be cut out."""
    pieces = _pieces(flow, region)
    cuts, candidate, heavy_seen = [region.entry], None, False
    for piece in pieces:
        if any(is_linear_map(n) for n in piece.nodes):
            if candidate is not None:
                cuts.append(candidate)
            candidate, heavy_seen = None, True
        # A view that flattens tokens belongs to the map after it; norms and activations go with the map before them.
        if heavy_seen and _layout(piece.exit) == _layout(region.entry):
            candidate = piece.exit
    cuts.append(region.exit)
    found = []
    for entry, exit_ in itertools.pairwise(cuts):
        inside = [p for p in pieces if flow.order[entry] < flow.order[p.exit] <= flow.order[exit_]]
        nodes = sorted((n for p in inside for n in p.nodes), key=flow.order.__getitem__)
        found.append(Region(entry=entry, exit=exit_, nodes=tuple(nodes)))
    return found


def _layout(node: fx.Node) -> tuple[str, ...] | None:
    """Which dimensions a tensor has: batch and time of a sequence, batch and rank of the rest; None for a tuple."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    lead = 2 if value.ndim == 3 else 1
    return (str(value.ndim), *(str(d) for d in value.shape[:lead]))


def _pieces(flow: DataFlow, region: Region) -> list[Region]:
    """The region between neighbours of its dominator chain: what every path passes, one after the other."""
    dag = flow.dag.subgraph({region.entry, *region.nodes})
    dominators = nx.immediate_dominators(dag, region.entry)
    chain: list[fx.Node] = [region.exit]
    while chain[-1] is not region.entry:
        chain.append(dominators[chain[-1]])
    chain.reverse()
    rank = {node: i for i, node in enumerate(chain)}
    members: list[list[fx.Node]] = [[] for _ in chain]
    for node in region.nodes:
        above = node
        while above not in rank or above is node:
            above = dominators[above]
        members[rank[above] + 1].append(node)
    return [
        Region(entry=entry, exit=exit_, nodes=tuple(members[i + 1]))
        for i, (entry, exit_) in enumerate(itertools.pairwise(chain))
    ]
