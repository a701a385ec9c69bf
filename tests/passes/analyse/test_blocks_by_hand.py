"""Networks of one kind of block each: where blocks, their branches and their smallest parts begin and end.

B batch, T time, D width
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.captured import traced
from tests.models import seeded, vectors
from tests.written import ends, written
from thesean.passes.analyse.blocks import _tandem_runs, find_blocks, halves, halves_or_whole, outer_halves, pieces
from thesean.passes.analyse.bypass import freed_params, removal, removals
from thesean.passes.analyse.chains import branches, chains, segments_of
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.fingerprint import exact_fingerprint, fingerprint, operator_kinds
from thesean.passes.analyse.regions import Region, module_regions
from thesean.passes.analyse.smallest_regions import smallest_regions
from thesean.passes.graph.nodes import above, attribute, mark_constants

aten = torch.ops.aten
D = 4


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x).cumsum(1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """A mixer and an MLP, put together as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.mix, self.mlp = Mixer(), Mlp()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = self.norms
        match self.how:
            case "norms before":
                x = x + self.mix(first(x))
                return x + self.mlp(second(x))
            case "norms behind":
                x = first(x + self.mix(x))
                return second(x + self.mlp(x))
            case "norms around":
                x = x + third(self.mix(first(x)))
                return x + fourth(self.mlp(second(x)))
            case "beside":
                return x + self.mix(first(x)) + self.mlp(first(x))
            case "beside, summed first":
                y = first(x)
                return x + (self.mix(y) + self.mlp(y))
            case "half of it":
                return x + 0.5 * self.mix(first(x))
            case "no sum":
                return torch.tanh(self.mlp(self.mix(x)))
            case "gates":
                x = x * torch.sigmoid(self.mix(first(x)))
                return x + self.mlp(second(x))
        raise ValueError(self.how)


class Net(nn.Module):
    def __init__(self, how: str, count: int) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, D), nn.ModuleList(Block(how) for _ in range(count))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@cache
def net(how: str, count: int = 3) -> tuple[fx.GraphModule, DataFlow]:
    graph_module = traced(seeded(Net, how, count), vectors(2, 5, 3))
    for node in graph_module.graph.find_nodes(op="get_attr"):
        node.meta["val"] = attribute(graph_module, str(node.target))
    mark_constants(graph_module.graph)
    return graph_module, data_flow(graph_module.graph)


def paths(regions: list[Region]) -> list[str]:
    return [region.path() for region in regions]


# how blocks are put together, and the branches of each
HALVES: dict[str, list[str]] = {
    "norms before": ["mix", "mlp"],
    "norms behind": ["mix", "mlp"],
    "norms around": ["mix", "mlp"],
    "beside": ["mix", "mlp"],
    "beside, summed first": ["mix", "mlp"],
    "half of it": [""],
    "no sum": [],
    "gates": ["", "mlp"],
}


@pytest.mark.parametrize("how", HALVES)
@pytest.mark.parametrize("count", [2, 3])
def test_blocks_are_the_modules_that_repeat_and_halves_what_is_added_in_them(how, count):
    _, flow = net(how, count)
    blocks = find_blocks(flow)
    assert paths(blocks) == [f"blocks.{k}" for k in range(count)]
    for number, block in enumerate(blocks):
        own = [f"blocks.{number}.{name}".rstrip(".") for name in HALVES[how]]
        found = halves(flow, block)
        if how == "half of it":
            assert [f.startswith(own[0]) for f in paths(found)] == [True]
            continue
        assert paths(found) == paths(outer_halves(flow, block)) == own
        assert halves_or_whole(flow, block) == (found or [block])


def test_pieces_are_branches_and_what_is_between():
    for how, names in HALVES.items():
        _, flow = net(how)
        between = ["mix", "norms.0", "mlp", "norms.1"] if how == "norms behind" else names or [""]
        for number, block in enumerate(find_blocks(flow)):
            found = pieces(flow, block)
            assert paths(found) == [f"blocks.{number}.{name}".rstrip(".") for name in between]
            nodes = [n for piece in found for n in piece.nodes]
            assert len(nodes) == len(set(nodes))
            assert set(nodes) <= set(block.nodes)
            assert names or found == [block]


def test_the_smallest_parts_of_a_row_are_its_maps_each_with_what_follows():
    _, flow = net("no sum")
    for number, block in enumerate(find_blocks(flow)):
        found = smallest_regions(flow, block)
        names = ("mix", "mix.out", "mlp", "")  # of a map and the running sum behind it, or the function
        assert paths(found) == [f"blocks.{number}.{name}".rstrip(".") for name in names]
        assert found[0].entry is block.entry
        assert found[-1].exit is block.exit
        assert [a.exit for a in found[:-1]] == [b.entry for b in found[1:]]
        assert [n for piece in found for n in piece.nodes] == list(block.nodes)


def test_segments_of_the_stream_make_up_what_is_between_its_cuts():
    for how in HALVES:
        _, flow = net(how)
        row = max(chains(flow), key=len)
        assert [a.exit for a in row[:-1]] == [b.entry for b in row[1:]]
        whole = Region(entry=row[0].entry, exit=row[-1].exit, nodes=tuple(n for s in row for n in s.nodes))
        assert segments_of(flow, whole) == row
        assert segments_of(flow, row[1]) == [row[1]]
        last = Region(entry=row[1].entry, exit=row[2].exit, nodes=(*row[1].nodes, *row[2].nodes))
        assert segments_of(flow, last) == row[1:3]


@pytest.mark.parametrize("how", ["norms before", "norms around", "beside", "beside, summed first"])
def test_what_is_taken_out_leaves_the_stream(how):
    graph_module, flow = net(how)
    for block in find_blocks(flow):
        found = outer_halves(flow, block)
        for half, ends_ in zip(found, removals(found), strict=True):
            assert ends_ is not None
            total, other = ends_
            if how == "beside, summed first":
                continue
            assert total.target is aten.add.Tensor
            assert other in total.all_input_nodes
            assert half.exit in above([i for i in total.all_input_nodes if i is not other], known={other})
        if how in ("norms before", "norms around"):
            norm = 2 * D  # weight and bias of the norm before, and of the one behind
            assert [freed_params(graph_module, h) for h in found] == [norm * (1 + (how == "norms around"))] * 2


def test_in_the_place_of_what_is_not_added_stands_what_it_reads_where_it_is_as_wide():
    _, flow = net("no sum")
    block = find_blocks(flow)[0]
    assert removal(block) == (block.exit, block.entry)
    regions = module_regions(flow)
    assert removal(regions["blocks.0.mlp.up"]) is None
    assert removals([block, regions["blocks.1.mlp.up"]]) == [(block.exit, block.entry), None]


def test_equal_blocks_have_equal_marks_and_others_have_not():
    _, flow = net("norms before")
    first, second, third = find_blocks(flow)
    _, other = net("norms behind")
    (changed, *_) = find_blocks(other)
    for mark in (fingerprint, exact_fingerprint):
        assert mark(first) == mark(second) == mark(third) != mark(changed)
    assert operator_kinds(first) == operator_kinds(changed)  # whatever their order
    assert len({operator_kinds(r) for r in (first, *halves(flow, first))}) == 3


def test_a_mark_to_the_last_argument_tells_numbers_and_masks():
    def marks(number: float) -> tuple[Any, Any]:
        graph_module = written(
            lambda c, x, w: c(aten.add.Scalar, c(aten.mul.Tensor, x, w), number), X, w=nn.Parameter(X[0])
        )
        x, _, product, total, _ = graph_module.graph.nodes
        region = Region(entry=x, exit=total, nodes=(product, total))
        return fingerprint(region), exact_fingerprint(region)

    assert marks(1.0) == marks(1.0)
    assert marks(1.0)[0] == marks(2.0)[0]
    assert marks(1.0)[1] != marks(2.0)[1]


X = vectors(2, 5, D)


def test_what_is_added_one_after_the_other_is_told_apart_where_it_shares_no_more_than_a_norm():
    """Of sums of x with three branches, in any order of brackets."""
    orders: list[Callable[..., Any]] = [
        lambda c, x, a, b, d: c(aten.add.Tensor, c(aten.add.Tensor, c(aten.add.Tensor, x, a), b), d),
        lambda c, x, a, b, d: c(aten.add.Tensor, c(aten.add.Tensor, a, b), c(aten.add.Tensor, x, d)),
        lambda c, x, a, b, d: c(aten.add.Tensor, x, c(aten.add.Tensor, a, c(aten.add.Tensor, b, d))),
        lambda c, x, a, b, d: c(aten.add.Tensor, c(aten.add.Tensor, d, c(aten.add.Tensor, b, a)), x),
    ]
    for order, shared in itertools.product(orders, (False, True)):

        def made(c: Any, x: Any, w: Any) -> Any:
            stem = c(aten.tanh.default, x)
            y = c(aten.layer_norm.default, stem, [D])
            a, b = c(aten.linear.default, y, w), c(aten.relu.default, c(aten.linear.default, y, w))
            return order(c, stem, a, b, c(aten.linear.default, a if shared else y, w))  # noqa: B023

        graph_module = written(made, X, w=nn.Parameter(vectors(D, D)))
        flow = data_flow(graph_module.graph)
        (segment,) = (s for s in chains(flow)[0] if s.is_fork())
        assert segment.exit is ends(graph_module)
        found = branches(flow, segment)
        if shared:
            assert len(found) < 3
            continue
        maps = [n for n in graph_module.graph.nodes if n.target is aten.linear.default]
        assert [r.nodes[0] for r in found] == sorted(maps, key=flow.order.__getitem__)
        assert {r.entry.target for r in found} == {aten.layer_norm.default}


def best_run(signatures: list[int], weight: list[bool]) -> tuple[int, int, int] | None:
    """(start, period, count): most weight, then the shortest period, then the first; it begins with weight."""
    size, found = len(signatures), []
    for start, period in itertools.product(range(size), range(1, size)):
        for count in range(2, (size - start) // period + 1):
            row = signatures[start : start + period * count]
            if weight[start] and row == row[:period] * count:
                found.append((sum(weight[start : start + period * count]), -period, -start, count))
    if not found:
        return None
    weighs, period, start, _ = max(found, key=lambda f: f[:3])
    count = max(f[3] for f in found if f[:3] == (weighs, period, start))
    return -start, -period, count


@pytest.mark.parametrize("seed", range(40))
def test_runs_are_the_repeats_of_most_weight_one_after_the_other(seed):
    generator = random.Random(seed)
    block = generator.choices(range(3), k=generator.randint(1, 3))
    around = [generator.choices(range(4), k=generator.randint(0, 3)) for _ in range(2)]
    signatures = around[0] + block * generator.randint(1, 4) + around[1]
    heavy = {s: generator.random() < 0.6 for s in range(4)}
    weight = [heavy[s] for s in signatures]
    found = _tandem_runs(signatures, weight)
    best = best_run(signatures, weight)
    assert (best is None) == (not found)
    for start, period, count in found:
        row = signatures[start : start + period * count]
        assert count >= 2
        assert weight[start]
        assert row == row[:period] * count
    assert all(a + p * c <= b for (a, p, c), (b, *_) in itertools.pairwise(found))
    if best is not None:
        covered = sum(sum(weight[s : s + p * c]) for s, p, c in found)
        assert covered >= sum(weight[best[0] : best[0] + best[1] * best[2]])
        assert best in found
