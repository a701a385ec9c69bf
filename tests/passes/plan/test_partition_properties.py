"""Random networks of residuals, branches, loops and several outputs: what is cut out of them is single-entry
single-exit, and a region that is replaced by itself changes nothing.

B batch, T time, D width
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

from tests.models import vectors
from thesean.errors import PlanError
from thesean.passes.analyse.chains import chains, segments_of
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.regions import Region, is_linear_map, is_single_entry_single_exit, module_regions
from thesean.passes.capture.capture import capture
from thesean.passes.graph.surgery import clone
from thesean.passes.plan.partition import partition
from thesean.passes.substitute import Substitute

# tests/passes/test_regions.py replaces regions of random networks as well
pytestmark = pytest.mark.thorough

WIDTH = 4


class Layer(nn.Module):
    """One of: a linear map, a norm, an elementwise function, a mixing of tokens; (kind, inner layers) around others."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.kind, inner = spec if isinstance(spec, tuple) else (spec, [])
        self.inner = nn.ModuleList(Layer(s) for s in inner)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner:
            x = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "linear":
                return self.one(x)
            case "norm":
                return self.norm(x)
            case "tanh":
                return torch.tanh(x)
            case "mix":
                return x.cumsum(1) * 0.1
            case "gate":
                return torch.sigmoid(self.one(x)) * self.two(x)
            case "in place":
                y = self.one(x)
                y += x
                return y.relu_()
            case "residual":
                return x + self.through(x)
            case "parallel":
                return x + self.one(self.norm(x)) + self.through(x)
            case "branches":
                return torch.tanh(self.one(x)) * self.through(x)
            case "twice":
                return self.through(self.through(x))
        raise ValueError(self.kind)


class Net(nn.Module):
    """Layers in a row; `taps` say after which of them an output leaves, `skips` from which to which a sum reaches."""

    def __init__(self, specs: list[Any], taps: list[int], skips: list[tuple[int, int]]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(s) for s in specs)
        self.taps, self.skips = taps, skips
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        streams = [self.stem(x)]
        for number, layer in enumerate(self.layers):
            y = layer(streams[-1])
            for start, end in self.skips:
                if end == number and start <= number:
                    y = y + streams[start]
            streams.append(y)
        return (self.head(streams[-1]), *(streams[t] for t in self.taps if t < len(streams)))


simple = st.sampled_from(["linear", "norm", "tanh", "mix", "gate", "in place"])
around = st.sampled_from(["residual", "parallel", "branches", "twice"])
layers = st.recursive(simple, lambda inner: st.tuples(around, st.lists(inner, min_size=1, max_size=3)), max_leaves=5)
rows = st.builds(lambda row, times: row * times, st.lists(layers, min_size=1, max_size=3), st.integers(1, 3))
nets = st.builds(
    Net,
    rows,
    st.lists(st.integers(0, 4), max_size=2),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=1),
)


# What is added beside the stream is a sum itself, of terms that read one another.
SUMS_IN_A_SUM = (
    "parallel",
    ["linear", ("residual", [("residual", ["linear"])]), ("residual", ["linear", "in place"])],
)


def captured_flow(net: Net) -> tuple[fx.GraphModule, DataFlow]:
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    graph_module = capture(net, vectors(2, 5, WIDTH)).graph_module
    return graph_module, data_flow(graph_module.graph)


def all_parts(flow: DataFlow) -> list[list[Region]]:
    found = []
    for granularity in ("block", "sublayer", "finest"):
        try:
            found.append([p.region for p in partition(flow, granularity)])
        except PlanError:  # a network of two linear maps may have no part
            assert len([n for n in flow.order if is_linear_map(n)]) <= 2 or not chains(flow)
    return found


def itself(graph_module: fx.GraphModule, region: Region) -> fx.GraphModule:
    """The region as a module: the same nodes, entry in, exit out, sizes from the guide's own graph."""
    graph = fx.Graph()
    copies = {region.entry: graph.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr" or node in region.nodes or node.target is torch.ops.aten.sym_size.int
            source = region.entry if node.target is torch.ops.aten.sym_size.int else None
            copies[node] = (
                graph.call_function(node.target, (copies[source], node.args[1]))  # type: ignore[arg-type]
                if source is not None
                else graph.node_copy(node, copy)
            )
        return copies[node]

    for node in region.nodes:
        copy(node)
    graph.output(copies[region.exit])
    return fx.GraphModule(graph_module, graph)


def replaced(graph_module: fx.GraphModule, regions: list[Region]) -> fx.GraphModule:
    new = clone(graph_module)
    by_name = {n.name: n for n in new.graph.nodes}
    for number, region in reversed(list(enumerate(regions))):  # from the end: an exit is the next region's entry
        here = region.translate(by_name)
        Substitute(f"region {number}", here, f"part_{number}", itself(new, here))(new)
    return new


def outputs(graph_module: fx.GraphModule, x: torch.Tensor) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(graph_module(x)) if isinstance(v, torch.Tensor)]


@settings(max_examples=10, deadline=None)
@given(net=nets)
@example(net=Net(["linear", "linear"], [1], [(0, 1)]))  # the residual's inner value is an output, too
@example(net=Net([SUMS_IN_A_SUM] * 2, [], [(2, 1)]))
def test_parts_are_disjoint_with_one_entry_and_exit_and_change_nothing_where_they_are_replaced_by_themselves(net):
    graph_module, flow = captured_flow(net)
    x = vectors(3, 7, WIDTH, seed=1)
    expected = outputs(graph_module, x)
    found = all_parts(flow)
    for parts in found:
        check_parts(flow, parts)
    for row in chains(flow):
        check_row(flow, row)
    for regions in (*found, *apart(flow, list(module_regions(flow).values()))):
        same = outputs(replaced(graph_module, regions), x)
        assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))


def apart(flow: DataFlow, regions: list[Region]) -> list[list[Region]]:
    """Rows of regions that share no node, in order: those of modules in modules come in different rows."""
    rows: list[list[Region]] = []
    for region in sorted(regions, key=lambda r: flow.order[r.exit]):
        row = next((r for r in rows if all(set(region.nodes).isdisjoint(other.nodes) for other in r)), None)
        if row is None:
            rows.append(row := [])
        row.append(region)
    return rows


def check_parts(flow: DataFlow, parts: list[Region]) -> None:
    nodes = [n for r in parts for n in r.nodes]
    assert len(nodes) == len(set(nodes))
    assert all(is_single_entry_single_exit(flow, r) for r in parts)
    assert [flow.order[r.exit] for r in parts] == sorted(flow.order[r.exit] for r in parts)


def check_row(flow: DataFlow, row: list[Region]) -> None:
    """A chain hands on one value, and is found again in the region that it makes up."""
    for before, after in itertools.pairwise(row):
        assert before.exit is after.entry
    nodes = [n for r in row for n in r.nodes]
    assert len(nodes) == len(set(nodes))
    whole = Region(entry=row[0].entry, exit=row[-1].exit, nodes=tuple(nodes))
    assert segments_of(flow, whole) == row
