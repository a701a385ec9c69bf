"""Counts of a whole batch, (T,), that become (B, T): every reader of one gives what it gave, a row at a time.

B batch, T time, N rows of a table, D width
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from thesean.passes.graph.record import record
from thesean.passes.graph.row_counts import give_rows, is_row_table, takes_rows

TABLE_ND = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
BATCH, TIME = 2, 5

aten = torch.ops.aten
Readers = Callable[[fx.Graph, fx.Node], fx.Node]


def embedded(graph: fx.Graph, count: fx.Node) -> fx.Node:
    return graph.call_function(aten.embedding.default, (graph.get_attr("table_ND"), count))


def in_front(graph: fx.Graph, count: fx.Node) -> fx.Node:
    return embedded(graph, graph.call_function(aten.unsqueeze.default, (count, 0)))


def repeated(graph: fx.Graph, count: fx.Node) -> fx.Node:
    rows = graph.call_function(aten.sym_size.int, (next(iter(graph.nodes)), 0))
    step_1T = graph.call_function(aten.unsqueeze.default, (count, 0))
    return embedded(graph, graph.call_function(aten.repeat.default, (step_1T, [rows, 1])))


def selected(graph: fx.Graph, count: fx.Node) -> fx.Node:
    bounded = graph.call_function(aten.clamp.default, (count, None, 8))
    return graph.call_function(aten.index_select.default, (graph.get_attr("table_1ND"), 1, bounded))


def wrapped(graph: fx.Graph, count: fx.Node) -> fx.Node:
    return embedded(graph, graph.call_function(aten.remainder.Scalar, (count, 9)))


def turned(graph: fx.Graph, count: fx.Node) -> fx.Node:
    """Angles of a rotation, one a step, in front of it a dimension of the batch."""
    step_1T = graph.call_function(aten.unsqueeze.default, (count, 0))
    step_1T1 = graph.call_function(aten.unsqueeze.default, (step_1T, -1))
    return graph.call_function(aten.cos.default, (graph.call_function(aten.mul.Tensor, (step_1T1, 0.1)),))


def crossed(graph: fx.Graph, count: fx.Node) -> fx.Node:
    """A distance of each step from each."""
    return graph.call_function(aten.sub.Tensor, (count, graph.call_function(aten.unsqueeze.default, (count, 1))))


def graph_of(readers: Readers) -> tuple[fx.GraphModule, fx.Node]:
    graph = fx.Graph()
    x_BTD = graph.placeholder("x")
    count = graph.call_function(aten.arange.default, (graph.call_function(aten.sym_size.int, (x_BTD, 1)),))
    graph.output(graph.call_function(aten.add.Tensor, (x_BTD, readers(graph, count))))
    held = {"table_ND": nn.Parameter(TABLE_ND), "table_1ND": nn.Parameter(TABLE_ND[None])}
    read = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    return fx.GraphModule({k: v for k, v in held.items() if k in read}, graph), count


def shapes_of(module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    values = record(module, {"x": torch.zeros(BATCH, TIME, 4)})
    return {n.name: tuple(v.shape) for n, v in values.items() if isinstance(v, torch.Tensor)}


@torch.no_grad()
@pytest.mark.parametrize("readers", [embedded, in_front, repeated, selected, wrapped, turned])
def test_each_row_reads_at_a_count_of_its_own(readers):
    module, count = graph_of(readers)
    x_BTD = torch.randn(BATCH, TIME, 4, generator=torch.Generator().manual_seed(1))
    longer_BTD = torch.cat([torch.zeros(BATCH, 3, 4), x_BTD], 1)
    late_BTD, early_BTD = module(longer_BTD)[:, 3:], module(x_BTD)
    shapes = shapes_of(module)
    assert takes_rows(count, shapes, BATCH)
    start_B = torch.tensor([3, 0])
    with module.graph.inserting_after(count):
        moved = module.graph.call_function(lambda step_T: step_T + start_B.unsqueeze(1), (count,))
    give_rows(module.graph, count, moved, shapes)
    module.graph.eliminate_dead_code()
    module.recompile()
    got_BTD = module(x_BTD)
    torch.testing.assert_close(got_BTD[0], late_BTD[0])
    torch.testing.assert_close(got_BTD[1], early_BTD[1])


def test_where_a_reader_relates_steps_it_takes_no_rows():
    graph = fx.Graph()
    x_BTD = graph.placeholder("x")
    count = graph.call_function(aten.arange.default, (graph.call_function(aten.sym_size.int, (x_BTD, 1)),))
    graph.output((x_BTD, crossed(graph, count)))
    module = fx.GraphModule(nn.Module(), graph)
    assert not takes_rows(count, shapes_of(module), BATCH)


def test_where_a_later_reader_relates_steps_it_takes_no_rows():
    """Whatever stands between them, and beside."""
    graph = fx.Graph()
    x_BTD = graph.placeholder("x")
    count = graph.call_function(aten.arange.default, (graph.call_function(aten.sym_size.int, (x_BTD, 1)),))
    later = graph.call_function(aten.add.Scalar, (count, 1))
    graph.output((x_BTD, crossed(graph, later), embedded(graph, count)))
    module = fx.GraphModule({"table_ND": nn.Parameter(TABLE_ND)}, graph)
    assert not takes_rows(count, shapes_of(module), BATCH)


@pytest.mark.parametrize(
    ("shape", "dim", "expected"),
    [
        ((9, 4), 0, True),
        ((9, 4), -2, True),
        ((9, 4), 1, False),
        ((1, 9, 4), 1, True),
        ((2, 9, 4), 1, False),
        ((9,), 0, False),
    ],
)
def test_a_table_of_rows_is_read_along_its_rows(shape, dim, expected):
    assert is_row_table(shape, dim) == expected


@pytest.mark.parametrize(("rows", "takes"), [(1, True), (BATCH, True), (TIME, False)])
def test_counts_that_have_rows_are_those_of_a_batch_or_of_all_of_it(rows, takes):
    node = fx.Graph().placeholder("count")
    assert takes_rows(node, {node.name: (rows, TIME)}, BATCH) is takes
