"""Find a multilayer perceptron in a region and read it off, numerically.

A region is y = down(h), h = act(up(x)) or act(gate(x)) * up(x), each token by itself. Neither the spelling of the
activation nor that of the linear layers is matched: which values are affine in the region's input is probed, and so is
from where on the output is affine again. What lies between must be one scalar function of one or two affine maps; a
grid of values tells which of the known activations it is. What was read must reproduce the recorded output.

M rows, D width, E hidden neurons
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import fx

from thesean.passes.analyse.affine_maps import Values, between, is_affine, probe_rows, read_affine, run_rows, tokens_of
from thesean.passes.analyse.regions import Region
from thesean.targets.shared.activations import ACTIVATIONS
from thesean.targets.shared.facts import Affine, MLPFacts

# Of 1 + |act(x)|. The two GELUs differ by 5e-4, one function written out in fp32 by 1e-6.
_SAME_FUNCTION = 1e-5

# Pre-activations that the grid spans: the bends of relu6 and hardswish are inside, exponentials don't overflow.
_GRID = 12.0

# Of the output's largest value.
_EXACT = 1e-4


@torch.no_grad()
def find_mlp(region: Region, values: dict[fx.Node, Any]) -> MLPFacts | None:
    """The region's MLP, or None where it is not one: mixing tokens, with a norm inside, or with no activation."""
    x, y = values[region.entry], values[region.exit]
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1] or not x.is_floating_point():
        return None
    chain = _dominators(region)
    x_MD = probe_rows(x)
    probed = run_rows(region.nodes, values, {region.entry: x_MD})
    affine = _affine_nodes(region, values, probed)
    if region.exit not in probed or region.exit in affine:
        return None
    found = _down(region, values, chain, affine)
    if found is None:
        return None
    mixed, down = found
    sources = _sources(region, values, affine, mixed)
    named = _activation(region, values, sources, mixed)
    if named is None:
        return None
    maps: list[Affine] = []
    for source in sources:
        nodes = between(region, [region.entry], source)
        read = read_affine(nodes, values, region.entry, source, x_MD, probed[source])
        if read is None:
            return None
        maps.append(read)
    name, gate_first = named
    if len(maps) == 1:
        facts = MLPFacts(up=maps[0], down=down, activation=name)
    else:
        gate, up = maps if gate_first else reversed(maps)
        facts = MLPFacts(up=up, down=down, activation=name, gate=gate)
    got = facts.down.of(facts.hidden(x))
    return _stored(facts, region) if (got - y).abs().max() <= _EXACT * y.abs().max() else None


def _stored(facts: MLPFacts, region: Region) -> MLPFacts:
    """In the precision of the region, which the probe may have widened: a weight of the guide's is shared again."""
    dtype = region.entry.meta["val"].dtype
    gate = None if facts.gate is None else facts.gate.to(dtype)
    return replace(facts, up=facts.up.to(dtype), down=facts.down.to(dtype), gate=gate)


def _affine_nodes(region: Region, values: Values, probed: dict[fx.Node, torch.Tensor]) -> set[fx.Node]:
    """Those affine in the entry, by their values on `probe_rows`; a tuple of slices is what it is cut from."""
    affine = {region.entry}
    for node in region.nodes:
        if node in probed:
            if is_affine(probed[node]):
                affine.add(node)
        elif isinstance(values[node], (tuple, list)) and all(i in affine for i in node.all_input_nodes):
            affine.add(node)
    return affine


def _dominators(region: Region) -> list[fx.Node]:
    """The nodes that all paths from entry to exit pass, both included, in order."""
    inside = {region.entry, *region.nodes}
    dag = nx.DiGraph((i, n) for n in region.nodes for i in n.all_input_nodes if i in inside)
    above = nx.immediate_dominators(dag, region.entry)
    chain = [region.exit]
    while chain[-1] is not region.entry:
        chain.append(above[chain[-1]])
    return chain[::-1]


def _down(region: Region, values: Values, chain: list[fx.Node], affine: set[fx.Node]) -> tuple[fx.Node, Affine] | None:
    """The first value from which on the region is affine, and the map from it to the output."""
    tokens = tokens_of(values[region.entry])
    for node in chain:
        value = values[node]
        if node in affine or not isinstance(value, torch.Tensor) or value.ndim < 2 or tokens_of(value) != tokens:
            continue
        if node is region.exit:
            return None  # an activation comes last
        nodes = between(region, [node], region.exit)
        h_ME = probe_rows(value)
        y_MD = run_rows(nodes, values, {node: h_ME}).get(region.exit)
        down = None if y_MD is None else read_affine(nodes, values, node, region.exit, h_ME, y_MD)
        if down is not None:
            return node, down
    return None


def _sources(region: Region, values: Values, affine: set[fx.Node], mixed: fx.Node) -> list[fx.Node]:
    """The affine values that `mixed` is computed from, in the graph's order.

    A written-out activation reads scaled copies of one value (x / sqrt(2), x / 2): each is followed back to it.
    """
    nodes = between(region, [region.entry], mixed)
    inside = set(nodes)
    border = [n for n in nodes if n in affine and any(u in inside and u not in affine for u in n.users)]
    shape = values[mixed].shape
    paths: dict[fx.Node, list[list[fx.Node]]] = {}
    for node in border:
        path = [node]
        while (parent := _copied_from(path[-1], inside, values, shape)) is not None:
            path.append(parent)
        paths.setdefault(path[-1], []).append(path)
    # the last value that all paths to one origin share
    shared = [next(n for n in group[0] if all(n in path for path in group)) for group in paths.values()]
    return sorted(shared, key=region.nodes.index)


def _copied_from(node: fx.Node, inside: set[fx.Node], values: Values, shape: torch.Size) -> fx.Node | None:
    """The only input of `node`, where it is as wide as the hidden value and no matrix is in between."""
    inputs = node.all_input_nodes
    above = [i for i in inputs if i in inside]
    matrices = [i for i in inputs if i not in inside and getattr(values[i], "ndim", 0) >= 2]
    if len(above) != 1 or matrices or getattr(values[above[0]], "shape", None) != shape:
        return None
    return above[0]


def _activation(region: Region, values: Values, sources: list[fx.Node], mixed: fx.Node) -> tuple[str, bool] | None:
    """The activation's name, and whether the first source is the gate; every element gets another value of the grid."""
    if len(sources) not in (1, 2) or any(getattr(values[s], "shape", None) != values[mixed].shape for s in sources):
        return None
    value = values[mixed]
    rows_ME = value.reshape(-1, value.shape[-1])
    generator = torch.Generator().manual_seed(4)
    grid_ME, other_ME = (
        torch.linspace(-_GRID, _GRID, rows_ME.numel())[torch.randperm(rows_ME.numel(), generator=generator)]
        .view(rows_ME.shape)
        .to(rows_ME)
        for _ in range(2)
    )
    given = dict(zip(sources, (grid_ME, other_ME), strict=False))
    got_ME = run_rows(between(region, sources, mixed), values, given).get(mixed)
    if got_ME is None:
        return None
    best: tuple[float, str, bool] | None = None
    for name, act in ACTIVATIONS.items():
        wanted = [(act(grid_ME), True)]
        if len(sources) == 2:
            wanted = [(act(grid_ME) * other_ME, True), (grid_ME * act(other_ME), False)]
        for want_ME, first in wanted:
            error = float(((got_ME - want_ME).abs() / (1 + want_ME.abs())).max())
            if error <= _SAME_FUNCTION and (best is None or error < best[0]):
                best = (error, name, first)
    return None if best is None else best[1:]
