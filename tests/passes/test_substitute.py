"""B batch, T time, D width"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from tests import captured
from tests.models import tokens, vectors
from tests.passes.contract import Example
from thesean.errors import PassRefused
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.regions import Region
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.nodes import owner
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text
from thesean.passes.plan.ceiling import without_parts
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition
from thesean.passes.substitute import Substitute


class Stateful(nn.Module):
    stateful = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(width, width)

    def forward(self, x, state=None):
        return self.last(x), x[:, -1]


def region_of(graph_module, path, granularity="block") -> Region:
    return next(p.region for p in partition(data_flow(graph_module.graph), granularity) if p.path == path)


def test_the_graph_before_and_after():
    graph_module = clone(captured.mlp().graph_module)
    assert [line for line in text(graph_module.graph) if "get_attr" not in line] == [
        "input_1 = placeholder input",
        "linear = aten.linear.default(input_1, _0_weight, _0_bias)",
        "relu = aten.relu.default(linear)",
        "linear_1 = aten.linear.default(relu, _2_weight, _2_bias)",
        "relu_1 = aten.relu.default(linear_1)",
        "linear_2 = aten.linear.default(relu_1, _4_weight, _4_bias)",
        "relu_2 = aten.relu.default(linear_2)",
        "linear_3 = aten.linear.default(relu_2, _6_weight, _6_bias)",
        "return linear_3",
    ]
    result = Substitute("2..3", region_of(graph_module, "2..3"), "part_0", nn.Linear(8, 8))(graph_module)
    assert result.modified
    assert text(graph_module.graph) == [
        "input_1 = placeholder input",
        "_0_weight = get_attr 0.weight",
        "_0_bias = get_attr 0.bias",
        "_4_weight = get_attr 4.weight",
        "_4_bias = get_attr 4.bias",
        "_6_weight = get_attr 6.weight",
        "_6_bias = get_attr 6.bias",
        "linear = aten.linear.default(input_1, _0_weight, _0_bias)",
        "relu = aten.relu.default(linear)",
        "part_0 = part_0(relu)",
        "linear_2 = aten.linear.default(part_0, _4_weight, _4_bias)",
        "relu_2 = aten.relu.default(linear_2)",
        "linear_3 = aten.linear.default(relu_2, _6_weight, _6_bias)",
        "return linear_3",
    ]
    assert not [n for n, _ in graph_module.named_parameters() if n.startswith("2.")]


def test_replacing_one_part_leaves_the_others_bit_identical():
    guide = captured.gpt2(3).graph_module
    hybrid = clone(guide)
    region = region_of(hybrid, "transformer.h.1")
    entry = region.entry.name
    Substitute("transformer.h.1", region, "part_0", nn.Linear(16, 16))(hybrid)
    theirs, own = dict(guide.named_parameters()), dict(hybrid.named_parameters())
    kept = [n for n in theirs if not n.startswith("transformer.h.1.")]
    assert sorted(own) == sorted([*kept, "part_0.weight", "part_0.bias"])
    assert all(torch.equal(own[n], theirs[n]) for n in kept)
    assert all(own[n] is not theirs[n] for n in kept)
    upstream = [
        n.name for n in guide.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)
    ]
    upstream = upstream[: upstream.index(entry) + 1]
    assert len(upstream) > 15
    ids = tokens(3, 7)
    expected, actual = (intermediates(g, upstream, with_output=False)(ids) for g in (guide, hybrid))
    assert all(torch.equal(actual[n], expected[n]) for n in upstream)


@pytest.mark.parametrize("part", [nn.Identity(), Stateful(32)])
def test_what_stands_for_a_part_belongs_to_the_module_that_it_stood_in(part):
    graph_module = clone(captured.gpt2().graph_module)
    region = region_of(graph_module, "transformer.h.0.attn", "sublayer")
    within, (reader, *_) = owner(region.exit), region.exit.users
    assert within
    Substitute("transformer.h.0.attn", region, "part_0", part)(graph_module)
    (call,) = graph_module.graph.find_nodes(op="call_module", target="part_0")
    (made,) = (n for n in reader.all_input_nodes if n is call or call in n.all_input_nodes)
    assert (owner(call), owner(made)) == (within, within)


def test_replacing_a_part_by_zero_leaves_what_is_beside_it():
    """x + part(x) with part = 0 is x: the residual stream stays, bit for bit."""
    hybrid = clone(captured.gpt2().graph_module)
    region = region_of(hybrid, "transformer.h.0.attn", "sublayer")
    (total,) = region.exit.users
    (stream,) = (a for a in total.all_input_nodes if a is not region.exit)
    zero = nn.Linear(16, 16)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    Substitute("attn", region, "part_0", zero)(hybrid)
    values = intermediates(hybrid, [total.name, stream.name], with_output=False)(tokens(2, 5))
    assert torch.equal(values[total.name], values[stream.name])


def test_a_module_with_a_state_gives_its_first_output():
    hybrid = clone(captured.gpt2().graph_module)
    module = Stateful(16)
    region = region_of(hybrid, "transformer.h.0.attn", "sublayer")
    entry = region.entry
    Substitute("attn", region, "part_0", module)(hybrid)
    assert [line for line in text(hybrid.graph) if "part_0" in line] == [
        f"part_0 = part_0({entry.name})",
        "getitem_6 = getitem(part_0, 0)",
    ]
    values = intermediates(hybrid, [entry.name, "getitem_6"], with_output=False)(tokens(2, 5))
    assert torch.equal(values["getitem_6"], module(values[entry.name])[0])


def test_tied_weights_survive_and_stay_tied():
    hybrid = clone(captured.tied().graph_module)
    Substitute("second", region_of(hybrid, "second"), "part_0", nn.Linear(8, 8))(hybrid)
    weights = {n: p for n, p in hybrid.named_parameters(remove_duplicate=False) if n.endswith("weight")}
    shared = {id(p) for n, p in weights.items() if n != "part_0.weight"}
    assert len(shared) == 1
    assert len(weights) >= 2
    assert hybrid(vectors(2, 8)).shape == (2, 8)


def test_replacing_the_part_whose_name_a_tied_weight_bears_keeps_the_weight():
    guide = captured.tied().graph_module
    hybrid = clone(guide)
    Substitute("first", region_of(hybrid, "first"), "part_0", nn.Identity())(hybrid)
    x = vectors(2, 8)
    layer = dict(guide.named_parameters(remove_duplicate=False))
    weight = layer["first.weight"]
    for name in ("second", "third"):
        x = x + torch.tanh(nn.functional.linear(x, weight, layer[f"{name}.bias"]))
    torch.testing.assert_close(hybrid(vectors(2, 8)), nn.functional.linear(x, weight))


def test_a_clone_has_parameters_of_its_own_and_ties_of_its_own():
    guide = captured.gpt2().graph_module
    new = clone(guide)
    assert not {id(p) for p in new.parameters()} & {id(p) for p in guide.parameters()}
    assert len(list(new.parameters())) == len(list(guide.parameters()))
    assert [n.name for n in new.graph.nodes] == [n.name for n in guide.graph.nodes]
    held = {id(p) for p in new.parameters()}
    assert all(
        id(n.meta["val"]) in held
        for n in new.graph.find_nodes(op="get_attr")
        if isinstance(n.meta["val"], nn.Parameter)
    )


def test_a_region_with_more_than_one_entry_is_refused():
    hybrid = clone(captured.gpt2().graph_module)
    region = region_of(hybrid, "transformer.h.0")
    before = text(hybrid.graph)
    broken = Region(entry=region.entry, exit=region.exit, nodes=region.nodes[2:])
    with pytest.raises(PassRefused, match=r"transformer\.h\.0: expected one entry and one exit, found more\. Split it"):
        Substitute("transformer.h.0", broken, "part_0", nn.Linear(16, 16))(hybrid)
    assert text(hybrid.graph) == before


def test_a_hybrid_is_refused_such_a_region_as_well_and_reads_the_data_flow_once(monkeypatch):
    bound_plan = make_plan(captured.gpt2(), "gru")
    (site,) = bound_plan.parts[1].sites
    broken = replace(site, region=replace(site.region, nodes=site.region.nodes[2:]))
    parts = (bound_plan.parts[0], replace(bound_plan.parts[1], sites=(broken,)))
    with pytest.raises(PassRefused, match=r"h\.1\.attn: expected one entry and one exit, found more"):
        build_hybrid(replace(bound_plan, parts=parts))
    with pytest.raises(PassRefused, match=r"h\.1\.attn: expected one entry and one exit, found more"):
        without_parts(replace(bound_plan, parts=parts))
    read: list[fx.Graph] = []

    def counted(graph: fx.Graph) -> DataFlow:
        read.append(graph)
        return data_flow(graph)

    for user in ("plan.hybrid", "substitute"):
        monkeypatch.setattr(f"thesean.passes.{user}.data_flow", counted)
    build_hybrid(bound_plan)
    assert len(read) == 1


def test_a_region_of_another_graph_is_refused():
    guide = captured.gpt2().graph_module
    with pytest.raises(PassRefused, match="belongs to another graph"):
        Substitute("a", region_of(guide, "transformer.h.0"), "part_0", nn.Linear(16, 16))(clone(guide))


def test_a_name_that_is_taken_is_refused():
    hybrid = clone(captured.gpt2().graph_module)
    with pytest.raises(PassRefused, match="attribute 'transformer' already"):
        Substitute("a", region_of(hybrid, "transformer.h.0"), "transformer", nn.Linear(16, 16))(hybrid)


def example() -> Example:
    graph_module = clone(captured.mlp().graph_module)
    substitution = Substitute("2..3", region_of(graph_module, "2..3"), "part_0", nn.Linear(8, 8))
    return Example(substitution, graph_module, (vectors(3, 8),), same_outputs=False)
