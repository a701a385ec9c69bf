"""What counts positions, on graphs that are written by hand: nothing is told but operators and their arguments.

B batch, T time
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from thesean.passes.analyse.positions import (
    Table,
    counters,
    dims_behind,
    running_sums,
    size_values,
    table_dim,
    table_rows,
    tables,
)
from thesean.passes.graph.halves import HELD

aten = torch.ops.aten
ROWS, COLUMNS = 6, 4

Call = Callable[..., Any]
Made = Callable[[Call, Any, Any], Any]


def graph_of(made: Made) -> fx.GraphModule:
    """What is made of an input x_BT and a table (ROWS, COLUMNS)."""
    root = nn.Module()
    root.table = nn.Parameter(torch.randn(ROWS, COLUMNS))
    graph = fx.Graph()
    x, table = graph.placeholder("x"), graph.get_attr("table")
    graph.output(made(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), x, table))
    return fx.GraphModule(root, graph)


def time(c: Call, x: Any) -> Any:
    return c(aten.sym_size.int, x, 1)


def steps(c: Call, x: Any) -> Any:
    return c(aten.arange.default, time(c, x))


def after(c: Call, x: Any, first: int) -> Any:
    return c(aten.add.Tensor, steps(c, x), first)


def zero(c: Call) -> Any:
    return c(aten.zeros.default, [1], dtype=torch.int64)


def alike(c: Call, x: Any, count: int) -> Any:
    """A size that is this, whatever the length."""
    return c(operator.mul, c(operator.floordiv, time(c, x), time(c, x)), count)


def sideways(c: Call, t: Any) -> Any:
    return c(aten.t.default, t)


# how a table is read, and (rows, first, the dimension that is read, how many dimensions follow it)
READ: dict[str, tuple[Made, tuple[int, int, int, int]]] = {
    "embedding": (lambda c, x, t: c(aten.embedding.default, t, steps(c, x)), (ROWS, 0, 0, 1)),
    "embedding from the third row": (lambda c, x, t: c(aten.embedding.default, t, after(c, x, 2)), (ROWS, 2, 0, 1)),
    "rows": (lambda c, x, t: c(aten.index.Tensor, t, [after(c, x, 1)]), (ROWS, 1, 0, 1)),
    "columns": (lambda c, x, t: c(aten.index.Tensor, t, [None, steps(c, x)]), (COLUMNS, 0, 1, 0)),
    "selected rows": (lambda c, x, t: c(aten.index_select.default, t, 0, steps(c, x)), (ROWS, 0, 0, 1)),
    "selected columns": (lambda c, x, t: c(aten.index_select.default, t, -1, steps(c, x)), (COLUMNS, 0, 1, 0)),
    "gathered": (
        lambda c, x, t: c(aten.gather.default, t, 0, c(aten.unsqueeze.default, steps(c, x), 1)), (ROWS, 0, 0, 0)
    ),
    "slice": (lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, time(c, x)), (ROWS, 0, 0, 1)),
    "slice from no start": (lambda c, x, t: c(aten.slice.Tensor, t, 0, None, time(c, x)), (ROWS, 0, 0, 1)),
    "slice of the first dimension, which is not named": (
        lambda c, x, t: c(aten.slice.Tensor, t, start=0, end=time(c, x)), (ROWS, 0, 0, 1)
    ),
    "slice of columns": (lambda c, x, t: c(aten.slice.Tensor, t, -1, 0, time(c, x), 1), (COLUMNS, 0, 1, 0)),
    "slice of columns, by names": (
        lambda c, x, t: c(aten.slice.Tensor, t, dim=1, end=time(c, x)), (COLUMNS, 0, 1, 0)
    ),
    "slice of a table that is made": (
        lambda c, x, t: c(aten.slice.Tensor, sideways(c, t), 0, 0, time(c, x)), (COLUMNS, 0, 0, 1)
    ),
    "counts of a mask": (
        lambda c, x, t: c(aten.embedding.default, t, c(aten.sub.Tensor, c(aten.cumsum.default, x, 1), 1)),
        (ROWS, 0, 0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("read", READ)
def test_a_table_that_steps_read_is_found_with_its_rows(read):
    made, (rows, first, dim, behind) = READ[read]
    graph_module = graph_of(made)
    (found,) = tables(graph_module)
    assert (found.rows, found.first) == (rows, first)
    assert found.reader is graph_module.graph.output_node().args[0]
    assert (table_dim(found, graph_module), dims_behind(found, graph_module)) == (dim, behind)


# steps that are not as many as rows: a token of the network's own before them, the last one left out, the last alone;
# and how long a sequence may be
MORE: dict[str, tuple[Made, int]] = {
    "one more": (
        lambda c, x, t: c(aten.embedding.default, t, c(aten.arange.default, c(operator.add, time(c, x), 1))), ROWS - 1
    ),
    "one less": (
        lambda c, x, t: c(aten.embedding.default, t, c(aten.arange.default, c(operator.sub, time(c, x), 1))), ROWS + 1
    ),
    "the last": (
        lambda c, x, t: c(aten.embedding.default, t, c(aten.full.default, [1], c(operator.sub, time(c, x), 1))), ROWS
    ),
    "a slice of one more": (
        lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, c(operator.add, time(c, x), 1)), ROWS - 1
    ),
    "a slice to before the end": (
        lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, c(operator.sub, time(c, x), 1)), ROWS + 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("read", MORE)
def test_a_step_more_or_less_than_rows_makes_the_longest_sequence_shorter_or_longer(read):
    made, longest = MORE[read]
    assert table_rows(graph_of(made)) == longest


@pytest.mark.parametrize("read", [*READ, *MORE])
def test_a_table_is_read_inside_as_far_as_its_limit_and_no_further(read):
    graph_module = graph_of({**READ, **MORE}[read][0])
    limit = table_rows(graph_module)
    assert limit is not None
    fits = shape_at(graph_module, limit)
    assert fits is not None
    assert shape_at(graph_module, limit + 1) in (None, fits)  # a slice ends with its table


def shape_at(graph_module: fx.GraphModule, time: int) -> torch.Size | None:
    """Of what is read; None where that is out of range."""
    try:
        return torch.Size(graph_module(torch.ones(2, time, dtype=torch.int64)).shape)
    except (IndexError, RuntimeError):
        return None


UNBOUND: dict[str, Made] = {
    "a slice of some rows": lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, 3),
    "a slice from behind the start": lambda c, x, t: c(aten.slice.Tensor, t, 0, 1, time(c, x)),
    "a slice of every second": lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, time(c, x), 2),
    "a slice from behind the start, by names": lambda c, x, t: c(aten.slice.Tensor, t, start=1, end=time(c, x)),
    "a slice of every second, by names": lambda c, x, t: c(aten.slice.Tensor, t, end=time(c, x), step=2),
    "a slice as long as the batch": lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, c(aten.sym_size.int, x, 0)),
    "a slice of what grows": lambda c, x, t: c(aten.slice.Tensor, steps(c, x), 0, 0, time(c, x)),
    "a slice of the input": lambda c, x, t: c(aten.slice.Tensor, x, 1, 0, time(c, x)),
    "a slice of two, as many as short ones have": lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, alike(c, x, 2)),
    "a slice of three, as many as long ones have": lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, alike(c, x, 3)),
    "a slice of more": lambda c, x, t: c(aten.slice.Tensor, t, 0, 0, c(operator.mul, time(c, x), 2)),
    "words": lambda c, x, t: c(aten.embedding.default, t, x),
    "places that stay": lambda c, x, t: c(aten.embedding.default, t, c(aten.arange.default, 3)),
    "every second row": lambda c, x, t: c(aten.embedding.default, t, c(aten.mul.Tensor, steps(c, x), 2)),
    "no more than the last row": lambda c, x, t: c(
        aten.embedding.default, t, c(aten.clamp.default, steps(c, x), None, ROWS - 1)
    ),
    "no more than the input says": lambda c, x, t: c(
        aten.embedding.default, t, c(aten.clamp.Tensor, steps(c, x), zero(c), x)
    ),
    "no more than what is made of the input": lambda c, x, t: c(
        aten.embedding.default, t, c(aten.clamp.Tensor, steps(c, x), zero(c), c(aten.neg.default, x))
    ),
    "no more than the tenth step, which short ones don't have": lambda c, x, t: c(
        aten.embedding.default, t, c(aten.clamp.Tensor, steps(c, x), zero(c), c(aten.select.int, steps(c, x), 0, 9))
    ),
    "again from the first": lambda c, x, t: c(
        aten.embedding.default, t, c(aten.remainder.Scalar, steps(c, x), ROWS)
    ),
    "rows and columns": lambda c, x, t: c(aten.index.Tensor, t, [steps(c, x), steps(c, x)]),
    "rows of the input": lambda c, x, t: c(aten.index.Tensor, x, [None, steps(c, x)]),
    "a mask of rows": lambda c, x, t: c(aten.index.Tensor, t, [c(aten.lt.Scalar, c(aten.arange.default, ROWS), 3)]),
}  # fmt: skip


@pytest.mark.parametrize("read", UNBOUND)
def test_what_no_length_reads_past_is_no_table_of_positions(read):
    graph_module = graph_of(UNBOUND[read])
    assert tables(graph_module) == []
    assert table_rows(graph_module) is None


def test_a_bound_that_lets_one_step_through_is_none():
    def read(c: Call, x: Any, t: Any) -> Any:
        return c(aten.embedding.default, t, c(aten.clamp.default, steps(c, x), None, ROWS))

    assert table_rows(graph_of(read)) == ROWS


def test_of_several_tables_the_shortest_bounds_a_sequence():
    def both(c: Call, x: Any, t: Any) -> Any:
        return c(aten.embedding.default, t, after(c, x, 1)), c(aten.embedding.default, sideways(c, t), steps(c, x))

    found = tables(graph_of(both))
    assert [(table.rows, table.first) for table in found] == [(ROWS, 1), (COLUMNS, 0)]
    assert table_rows(graph_of(both)) == COLUMNS


def test_indices_are_told_where_the_reader_has_them():
    graph_module = graph_of(READ["columns"][0])
    (found,) = tables(graph_module)
    assert isinstance(found, Table)
    assert found.indices.target is aten.arange.default


COUNTERS: dict[str, tuple[Made, float]] = {
    "arange": (lambda c, x, t: steps(c, x), 1.0),
    "arange from two": (lambda c, x, t: c(aten.arange.start, 2, c(operator.add, time(c, x), 2)), 1.0),
    "arange by threes": (
        lambda c, x, t: c(aten.arange.start_step, 0, c(operator.mul, time(c, x), 3), 3), 3.0
    ),
    "running sum of ones": (lambda c, x, t: c(aten.cumsum.default, c(aten.ones.default, [2, time(c, x)]), 1), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTERS)
def test_what_counts_steps_is_found_with_its_slope(name):
    made, slope = COUNTERS[name]
    graph_module = graph_of(made)
    (found,) = counters(graph_module)
    assert found.node is graph_module.graph.output_node().args[0]
    assert found.slope == slope


NO_COUNTERS: dict[str, Made] = {
    "as many as rows": lambda c, x, t: c(aten.arange.default, 3),
    "as many as the batch": lambda c, x, t: c(aten.arange.default, c(aten.sym_size.int, x, 0)),
    "backwards": lambda c, x, t: c(aten.arange.start_step, time(c, x), 0, -1),
    "what the input decides": lambda c, x, t: c(aten.cumsum.default, x, 1),
    "a sum of nothing": lambda c, x, t: c(aten.cumsum.default, c(aten.zeros.default, [2, time(c, x)]), 1),
    "a sum of sums": lambda c, x, t: c(aten.cumsum.default, steps(c, x), 0),
    "a sum over rows": lambda c, x, t: c(aten.cumsum.default, c(aten.ones.default, [time(c, x), 7]), 0),
    "complex": lambda c, x, t: c(
        aten.cumsum.default, c(aten.ones.default, [time(c, x)], dtype=torch.complex64), 0
    ),
    "what is made of a count": lambda c, x, t: after(c, x, 2),
    "as many as steps, where there are enough": lambda c, x, t: c(
        aten.arange.start, 3, c(operator.floordiv, c(operator.mul, time(c, x), 10), 7)
    ),
    "what short ones don't have": lambda c, x, t: c(aten.arange.start, 9, c(operator.mul, time(c, x), 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_COUNTERS)
def test_what_counts_something_else_is_none(name):
    graph_module = graph_of(NO_COUNTERS[name])
    assert graph_module.graph.output_node().args[0] not in [counter.node for counter in counters(graph_module)]


SUMS: dict[str, tuple[Made, bool]] = {
    "a mask": (lambda c, x, t: c(aten.cumsum.default, x, 1), True),
    "a cast mask": (
        lambda c, x, t: c(aten.cumsum.default, c(aten.to.dtype, c(aten._to_copy.default, x), torch.int64), 1), True
    ),
    "what was compared": (lambda c, x, t: c(aten.cumsum.default, c(aten.ne.Scalar, x, 1), 1), True),
    "what was computed": (lambda c, x, t: c(aten.cumsum.default, c(aten.mul.Tensor, x, 2), 1), False),
    "what sizes decide": (lambda c, x, t: c(aten.cumsum.default, c(aten.ne.Scalar, steps(c, x), 1), 0), False),
    "words": (
        lambda c, x, t: (c(aten.embedding.default, t, x), c(aten.cumsum.default, x, 1)), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_a_running_sum_counts_what_a_mask_shows(name):
    made, counts = SUMS[name]
    graph_module = graph_of(made)
    found = running_sums(graph_module)
    assert [total.target for total, _ in found] == [aten.cumsum.default] * counts
    assert all(mask.op == "placeholder" or mask.target is aten.ne.Scalar for _, mask in found)


def test_what_sizes_decide_is_known_at_any_length_and_what_is_held_is_as_long_at_each():
    graph_module = graph_of(lambda c, x, t: (steps(c, x), c(aten.sym_size.int, x, 0), c(aten.mul.Tensor, x, 2)))
    given: Any = graph_module.graph.output_node().args[0]
    counted, batch, made = given
    for length in (1, 7):
        known = size_values(graph_module, length)
        assert known(counted).tolist() == list(range(length))
        assert known(made) is None
    assert size_values(graph_module, 1)(batch) == size_values(graph_module, 7)(batch)
    graph_module.graph.find_nodes(op="placeholder")[0].meta[HELD] = True
    assert len(size_values(graph_module, 2)(counted)) == len(size_values(graph_module, 3)(counted))
