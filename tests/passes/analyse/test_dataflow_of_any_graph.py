"""What flows where, against its definition: on graphs that are drawn, and on a table of small ones.

B batch, T time, D width
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx, nn

from tests.written import ends, written
from thesean.passes.analyse.dataflow import (
    MASK,
    SOURCE,
    DataFlow,
    data_flow,
    immediate_dominators,
    is_size_only,
    side_slice,
)

aten = torch.ops.aten


def drawn(seed: int, outputs: int) -> fx.Graph:
    """Sums and functions of one or two inputs and any earlier nodes, some of which lead nowhere."""
    generator = random.Random(seed)

    def made(call: Callable[..., Any], *inputs: Any, w: Any) -> list[Any]:
        nodes = list(inputs)
        for _ in range(generator.randint(3, 14)):
            near = nodes[-generator.randint(1, 4) :]
            given = [generator.choice(near), generator.choice([*nodes, *near, w])]
            kind = generator.choice([aten.tanh.default, aten.add.Tensor, aten.mul.Tensor])
            nodes.append(call(kind, *given[: 1 if kind is aten.tanh.default else 2]))
        return generator.sample(nodes[len(inputs) :], min(outputs, len(nodes) - len(inputs)))

    return written(made, *[torch.ones(2, 3)] * (1 + seed % 2), w=nn.Parameter(torch.ones(3))).graph


def by_definition(flow: DataFlow) -> dict[fx.Node, fx.Node]:
    """Links, one output after the other: by what can still be reached where a node is taken out."""
    left = set(flow.dag) - {SOURCE, flow.sink}
    outputs = sorted(flow.dag.predecessors(flow.sink), key=flow.order.__getitem__)
    found = {}
    while left:
        leads = {o: left & ({o} | nx.ancestors(flow.dag, o)) for o in outputs}
        end = max(outputs, key=lambda o: len(leads[o]))
        inside = flow.dag.subgraph(leads[end]).copy()
        left -= leads[end]
        firsts = [n for n in inside if not inside.in_degree(n)]
        inside.add_edges_from((SOURCE, n) for n in firsts)
        for a in set(inside) - {end, SOURCE}:
            without = {b: inside.subgraph(set(inside) - {b}) for b in inside}
            after = [b for b in nx.descendants(inside, a) if b is end or not nx.has_path(without[b], a, end)]
            nearest = min(after, key=flow.order.__getitem__)
            if not nx.has_path(without[a], SOURCE, nearest):
                found[a] = nearest
    return found


@pytest.mark.parametrize("seed", range(24))
def test_links_are_what_every_path_passes(seed):
    flow = data_flow(drawn(seed, outputs=1 + seed % 3))
    assert flow.links == by_definition(flow)
    assert flow.links_back == {b: a for a, b in flow.links.items()}
    assert len(flow.links_back) == len(flow.links)


@pytest.mark.parametrize("seed", range(24))
def test_the_flow_holds_what_an_input_reaches_and_what_reaches_an_output(seed):
    graph = drawn(seed, outputs=2)
    flow, sink = data_flow(graph), graph.output_node()
    inputs = set(graph.find_nodes(op="placeholder"))
    reads = nx.DiGraph((i, n) for n in graph.nodes for i in n.all_input_nodes)
    reached = inputs.union(*(nx.descendants(reads, x) for x in inputs if x in reads))
    main = reached & {sink, *nx.ancestors(reads, sink)}
    assert set(flow.dag) - {SOURCE} == main
    assert {(a, b) for a, b in flow.dag.edges if a != SOURCE} == {(a, b) for a, b in reads.edges if {a, b} <= main}
    assert {b for a, b in flow.dag.edges if a == SOURCE} == inputs & main
    assert set(graph.find_nodes(op="get_attr")) <= flow.side
    assert [flow.order[n] for n in graph.nodes] == list(range(len(graph.nodes)))


@pytest.mark.parametrize("seed", range(12))
def test_dominators_are_those_of_networkx(seed):
    flow = data_flow(drawn(seed, outputs=3))
    nodes = [n for n in flow.order if n in flow.dag]
    found = immediate_dominators(nodes, lambda n: [p for p in flow.dag.predecessors(n) if p != SOURCE], flow.order)
    want = nx.immediate_dominators(flow.dag, SOURCE)
    assert found == {n: want[n] for n in nodes}


def test_what_flows_within_some_nodes_is_read_as_if_nothing_else_read_them():
    def made(call: Callable[..., Any], x: Any) -> list[Any]:
        first = call(aten.tanh.default, x)
        second = call(aten.exp.default, first)
        third = call(aten.neg.default, second)
        return [third, call(aten.add.Tensor, first, second)]

    flow = data_flow(written(made, torch.ones(2, 3)).graph)
    x, first, second, third, _ = (n for n in flow.order if n in flow.dag and n is not flow.sink)
    inner = flow.within(first, [second, third])
    assert (x, first) in flow.links.items()
    assert inner.links == {first: second, second: third}


TOKENS, X = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, 4)
Made = Callable[..., Any]


def test_a_module_and_what_it_gives_are_of_the_flow():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    x.meta["val"], w.meta["val"] = X, nn.Parameter(torch.ones(4))
    called = graph.call_module("part", (x, w))
    first = graph.call_function(operator.getitem, (called, 0))
    first.meta["val"] = X
    graph.output(first)
    assert side_slice(graph) == {w}
    assert set(data_flow(graph).dag) == {SOURCE, x, called, first, graph.output_node()}


def size(c: Any, x: Any) -> Any:
    return c(aten.sym_size.int, x, 1)


# of tokens_BT, x_BTD and a parameter (8, 4) or a buffer of that size: whether what is made is beside the flow
SIDE: dict[str, tuple[Made, bool]] = {
    "what is made of states": (lambda c, ids, x, w, b: c(aten.tanh.default, x), False),
    "a state and a parameter": (lambda c, ids, x, w, b: c(aten.linear.default, x, w), False),
    "a table of tokens": (lambda c, ids, x, w, b: c(aten.embedding.default, w, ids), False),
    "a table of tokens in a buffer": (lambda c, ids, x, w, b: c(aten.embedding.default, b, ids), True),
    "a table of places": (lambda c, ids, x, w, b: c(aten.embedding.default, w, c(aten.arange.default, 5)), True),
    "a mask": (lambda c, ids, x, w, b: c(aten.ne.Scalar, ids, 0), True),
    "a mask to be added": (lambda c, ids, x, w, b: c(aten.to.dtype, c(aten.ne.Scalar, ids, 0), torch.float32), True),
    "a mask of a state's kind": (lambda c, ids, x, w, b: c(aten.type_as.default, ids, x), True),
    "a mask as wide as a state": (
        lambda c, ids, x, w, b: c(aten.expand_as.default, c(aten.unsqueeze.default, ids, 2), x), True
    ),
    "a state of a mask's kind": (lambda c, ids, x, w, b: c(aten.type_as.default, x, ids), False),
    "places of a state's kind": (
        lambda c, ids, x, w, b: c(aten.mul.Tensor, c(aten.type_as.default, c(aten.arange.default, 4), x), w), True
    ),
    "a size": (lambda c, ids, x, w, b: size(c, x), True),
    "zeros as many as states": (lambda c, ids, x, w, b: c(aten.zeros_like.default, x), True),
    "places as many as states": (lambda c, ids, x, w, b: c(aten.arange.default, size(c, x)), True),
    "the largest of states": (lambda c, ids, x, w, b: c(aten.argmax.default, x, -1), False),
    "a mask of states": (lambda c, ids, x, w, b: c(aten.gt.Scalar, c(aten.tanh.default, x), 0), False),
    "a mask and states": (lambda c, ids, x, w, b: c(aten.mul.Tensor, x, c(aten.unsqueeze.default, ids, 2)), False),
    "two parameters": (lambda c, ids, x, w, b: c(aten.mul.Tensor, w, w), True),
    "whole numbers of a parameter": (
        lambda c, ids, x, w, b: c(aten.argmax.default, c(aten.embedding.default, w, ids), -1), False
    ),
    "tokens counted with a table": (
        lambda c, ids, x, w, b: c(aten.bucketize.Tensor, ids, c(aten.select.int, w, 0, 0)), True
    ),
    "several of a table": (
        lambda c, ids, x, w, b: c(
            aten._embedding_bag.default, w, c(aten.select.int, ids, 0, 0), c(aten.arange.default, 1)
        ),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDE)
def test_beside_the_flow_stands_what_no_hidden_state_flows_through(name):
    made, beside = SIDE[name]
    graph_module = written(made, TOKENS, X, w=nn.Parameter(torch.rand(8, 4).sort().values), b=torch.ones(8, 4))
    side = side_slice(graph_module.graph)
    ids, x = graph_module.graph.find_nodes(op="placeholder")
    assert (ends(graph_module) in side) == beside
    assert (ids in side, x in side, graph_module.graph.output_node() in side) == (True, False, False)


def cell(c: Any, x: Any, state: Any, weights: list[Any]) -> Any:
    return c(aten.rnn_tanh.input, x, state, weights, False, 1, 0.0, False, False, True)


# of x_BTD, what is given beside it, and a cell's weights: whether that is a hidden state of its own
STARTS: dict[str, tuple[Made, torch.Tensor, bool]] = {
    "a cell's first state": (lambda c, x, h, v, w: cell(c, x, h, [v, w]), torch.zeros(1, 2, 4), False),
    "picked of many": (
        lambda c, x, h, v, w: cell(c, x, c(aten.unsqueeze.default, c(aten.select.int, h, 0, 1), 0), [v, w]),
        torch.zeros(3, 2, 4), False,
    ),
    "one of which the size is read too": (
        lambda c, x, h, v, w: (cell(c, x, h, [v, w]), size(c, h)), torch.zeros(1, 2, 4), False
    ),
    "one that is read elsewhere": (
        lambda c, x, h, v, w: (cell(c, x, h, [v, w]), c(aten.tanh.default, h)), torch.zeros(1, 2, 4), True
    ),
    "one that is changed before": (
        lambda c, x, h, v, w: cell(c, x, c(aten.tanh.default, h), [v, w]), torch.zeros(1, 2, 4), True
    ),
    "what the cell reads": (lambda c, x, h, v, w: cell(c, h, x, [v, w]), torch.zeros(2, 5, 4), True),
    "ones and zeros that are asked": (
        lambda c, x, h, v, w: c(aten.masked_fill.Scalar, x, c(aten.eq.Scalar, h, 0), 0.0), torch.ones(2, 5, 1), False
    ),
    "ones and zeros that are asked, and computed with": (
        lambda c, x, h, v, w: c(aten.mul.Tensor, h, c(aten.masked_fill.Scalar, x, c(aten.eq.Scalar, h, 0), 0.0)),
        torch.ones(2, 5, 1), True,
    ),
    "what is asked for its size alone": (lambda c, x, h, v, w: (x, size(c, h)), torch.ones(2, 5, 1), True),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_what_is_given_beside_states_is_one_unless_cells_start_with_it_or_it_is_only_asked(name):
    made, given, is_state = STARTS[name]
    x = torch.zeros(1, 2, 4) if name == "what the cell reads" else X
    graph = written(made, x, given, v=nn.Parameter(torch.ones(4, 4)), w=nn.Parameter(torch.ones(4, 4))).graph
    _, h = graph.find_nodes(op="placeholder")
    assert (h not in side_slice(graph)) == is_state
    h.meta[MASK] = True
    assert h in side_slice(graph)


def test_only_sizes_flow_into_what_is_filled():
    graph_module = written(
        lambda c, x: [
            c(aten.zeros_like.default, x), size(c, x), c(aten.tanh.default, x), c(aten.split.Tensor, x, 1, 2)
        ],
        X,
    )  # fmt: skip
    assert [is_size_only(n) for n in ends(graph_module)] == [True, True, False, False]
