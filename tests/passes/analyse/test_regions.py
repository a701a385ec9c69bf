"""B batch, D width"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from tests import captured
from tests.models import vectors
from thesean.errors import PlanError
from thesean.passes.analyse.chains import branches, chains
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.regions import Region, is_single_entry_single_exit, module_regions, sum_of
from thesean.passes.capture.capture import capture
from thesean.passes.graph.nodes import attribute
from thesean.passes.graph.surgery import clone
from thesean.passes.plan.partition import partition
from thesean.passes.substitute import Substitute

WIDTH = 4


class Net(nn.Module):
    """A list of layers: "linear", "norm", "first" (adds the first hidden state, a skip over everything between), or a
    list of layers with a residual connection around it.
    """

    def __init__(self, layers: list) -> None:
        super().__init__()
        self.kinds = layers
        self.layers = nn.ModuleList(_module(layer) for layer in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == "first":
                x = x * first
            elif isinstance(kind, list):
                x = x + layer(x)
            else:
                x = layer(x)
        return x


def _module(layer) -> nn.Module:
    if isinstance(layer, list):
        return Net(layer)
    if layer == "linear":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return nn.LayerNorm(WIDTH) if layer == "norm" else nn.Identity()


simple = st.sampled_from(["linear", "norm", "linear", "first"])
blocks = st.lists(st.one_of(simple, st.lists(simple, min_size=1, max_size=3)), min_size=1, max_size=3)
nets = st.builds(lambda block, repeats, tail: block * repeats + tail, blocks, st.integers(1, 2), blocks)


def extracted(graph_module: fx.GraphModule, region: Region) -> fx.GraphModule:
    """The region as a module of its own: entry in, exit out."""
    graph = fx.Graph()
    copies = {region.entry: graph.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr" or node in region.nodes
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in region.nodes:
        copy(node)
    graph.output(copies[region.exit])
    return fx.GraphModule(graph_module, graph)


def replaced_by_itself(graph_module: fx.GraphModule, regions: list[Region]) -> fx.GraphModule:
    new = clone(graph_module)
    by_name = {n.name: n for n in new.graph.nodes}
    for number, region in reversed(list(enumerate(regions))):  # from the end: an exit is the next region's entry
        here = Region(
            entry=by_name[region.entry.name],
            exit=by_name[region.exit.name],
            nodes=tuple(by_name[n.name] for n in region.nodes),
        )
        module = extracted(new, here)
        assert Substitute(f"region {number}", here, f"part_{number}", module)(new).modified
    return new


def main_chain(flow: DataFlow) -> list[Region]:
    """The longest chain of the graph: its main stream."""
    return max(chains(flow), key=len, default=[])


def overlapping_regions(flow: DataFlow) -> list[Region]:
    inner = [b for s in main_chain(flow) if s.is_fork() for b in branches(flow, s)]
    return [*inner, *module_regions(flow).values()]


@pytest.mark.thorough
@settings(max_examples=10, deadline=None)
@given(layers=nets)
def test_a_region_of_any_network_can_be_replaced_by_itself(layers):
    torch.manual_seed(0)
    guide = capture(nn.Sequential(nn.Linear(WIDTH, WIDTH), Net(layers), nn.Linear(WIDTH, 2)), vectors(2, WIDTH))
    graph_module, flow = guide.graph_module, data_flow(guide.graph_module.graph)
    x = vectors(5, WIDTH, seed=1)
    expected = graph_module(x)
    for region in overlapping_regions(flow):
        assert is_single_entry_single_exit(flow, region)
        assert torch.equal(replaced_by_itself(graph_module, [region])(x), expected)
    for disjoint in (main_chain(flow), *_parts(flow)):
        nodes = [n for r in disjoint for n in r.nodes]
        assert len(nodes) == len(set(nodes))
        assert torch.equal(replaced_by_itself(graph_module, disjoint)(x), expected)


def _parts(flow: DataFlow) -> list[list[Region]]:
    try:
        return [[p.region for p in partition(flow, g)] for g in ("block", "sublayer")]
    except PlanError:
        return []  # a network of two linear maps may have no part


def test_segments_of_gpt2_are_two_residual_halves_a_block():
    flow = captured.flow_of(captured.gpt2())
    forks = [s for s in main_chain(flow) if s.is_fork() and s.is_heavy()]
    assert [s.path() for s in forks] == [
        "transformer.h.0", "transformer.h.0", "transformer.h.1", "transformer.h.1",
    ]  # fmt: skip


def test_a_branch_starts_after_its_norm():
    guide = captured.gpt2()
    flow = captured.flow_of(guide)
    attention, mlp = (s for s in main_chain(flow) if s.is_fork() and s.path() == "transformer.h.0")
    (branch,) = branches(flow, attention)
    assert branch.path() == "transformer.h.0.attn"
    assert branch.entry.target is torch.ops.aten.layer_norm.default
    (branch,) = branches(flow, mlp)
    assert branch.path() == "transformer.h.0.mlp"


def test_norms_and_tables_are_not_heavy():
    flow = captured.flow_of(captured.gpt2())
    light = [s for s in main_chain(flow) if s.exit.target is torch.ops.aten.layer_norm.default]
    assert light
    assert not any(s.is_heavy() for s in light)


def test_module_regions_are_named_by_their_modules():
    found = module_regions(captured.flow_of(captured.gpt2()))
    assert {"transformer.h.0", "transformer.h.0.attn", "transformer.h.0.mlp", "transformer.h.1.ln_1"} <= set(found)
    assert "transformer.wte" not in found  # nothing flows into a table of tokens


def test_a_region_with_a_second_entry_or_exit_is_told_apart():
    flow = captured.flow_of(captured.gpt2())
    region = module_regions(flow)["transformer.h.0"]
    assert is_single_entry_single_exit(flow, region)
    without_middle = Region(entry=region.entry, exit=region.exit, nodes=region.nodes[1:])
    assert not is_single_entry_single_exit(flow, without_middle)
    without_exit = Region(entry=region.entry, exit=region.exit, nodes=region.nodes[:-1])
    assert not is_single_entry_single_exit(flow, without_exit)


@pytest.mark.parametrize("guide", [captured.gpt2, captured.resnet, captured.functional])
def test_parts_of_real_networks_can_be_replaced_by_themselves(guide):
    graph_module = guide().graph_module
    values = guide().signature.random_inputs(dict.fromkeys(guide().signature.symbols, 3), seed=2)
    flow = data_flow(graph_module.graph)
    parts = [p.region for p in partition(flow) if _self_contained(p.region, graph_module)]
    if guide is not captured.gpt2:  # its attentions read sizes and masks from outside
        assert parts
    expected = graph_module(**values)
    actual = replaced_by_itself(graph_module, parts)(**values)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def _self_contained(region: Region, graph_module: fx.GraphModule) -> bool:
    inside = {region.entry, *region.nodes}
    outside = [i for n in region.nodes for i in n.all_input_nodes if i not in inside]
    return all(i.op == "get_attr" and attribute(graph_module, str(i.target)) is not None for i in outside)


def test_a_region_whose_inside_is_read_outside_of_it_is_told_apart():
    """Up to the last addition, which reads the block's middle as well as its end."""
    flow = captured.flow_of(captured.gpt2())
    region = module_regions(flow)["transformer.h.0"]
    shorter = Region(entry=region.entry, exit=region.nodes[-2], nodes=region.nodes[:-1])
    assert not is_single_entry_single_exit(flow, shorter)
    assert not is_single_entry_single_exit(flow, Region(entry=region.entry, exit=region.exit, nodes=()))


@pytest.mark.parametrize(
    ("shape", "kwargs", "first", "is_sum"),
    [
        ((2, 3, WIDTH), {}, True, True),
        ((2, 3, WIDTH), {}, False, True),
        ((WIDTH,), {}, True, False),  # a bias
        (None, {}, True, False),  # nobody recorded what it is
        ((2, 3, WIDTH), {"alpha": 2}, True, False),  # it enters as something else
        ((2, 3, WIDTH), {"alpha": 2}, False, True),  # the branch does, which is its own affair
    ],
)
def test_a_branch_is_summed_with_a_stream_of_its_own_rank_that_enters_as_it_is(shape, kwargs, first, is_sum):
    graph = fx.Graph()
    branch, stream = graph.placeholder("branch"), graph.placeholder("stream")
    branch.meta["val"] = torch.ones(2, 3, WIDTH)
    if shape is not None:
        stream.meta["val"] = torch.ones(shape)
    both = (branch, stream) if first else (stream, branch)
    total = graph.call_function(torch.ops.aten.add.Tensor, both, kwargs)
    assert sum_of(branch) == ((total, stream) if is_sum else None)
    graph.call_function(torch.ops.aten.relu.default, (branch,))
    assert sum_of(branch) is None  # it is read elsewhere too


def test_a_branch_that_is_added_to_itself_or_to_a_number_is_no_sum_with_a_stream():
    for other in (None, 1.0):
        graph = fx.Graph()
        branch = graph.placeholder("branch")
        branch.meta["val"] = torch.ones(2, 3, WIDTH)
        graph.call_function(torch.ops.aten.add.Tensor, (branch, branch if other is None else other))
        assert sum_of(branch) is None
