"""Keep positions inside the guide's tables: a recurrence runs past their last row, an absolute position can't.

T time
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.analyse.positions import (
    Table,
    dims_behind,
    rows_of,
    table_dim,
    table_rows,
    tables,
)
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.row_counts import select_steps
from thesean.recipe import Positions

aten = torch.ops.aten


@dataclass(frozen=True)
class BoundPositions(Pass):
    """table[t]  =>  table[min(t, rows - 1)] ("clamp"), table[t mod rows] ("wrap") or
    table[min(t, rows - 1)] (t < rows) ("drop"), for counted positions only.

    Indices that come from the caller's data stay as they are. A slice table[:T] becomes table[t] first. Lengths that
    the table holds give the same numbers as before. "refuse" changes nothing: past the table the guide's own error
    stands. Apply it before ThreadState, whose offset then enters upstream of the bound.

    "drop" is for tables that are added: rows of zeros add nothing. A rotation that is computed from t has no table and
    goes on; one that is stored multiplies, and its zeros would silence what they meet: "clamp" it. A table of whole
    numbers that index another one goes on counting. Raises PassRefused for one of anything else.
    """

    in_place = True

    mode: Positions = "clamp"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self.mode not in get_args(Positions):
            raise PassRefused(
                f"bound positions: expected one of {', '.join(get_args(Positions))}, found {self.mode!r}."
            )
        if self.mode == "drop":
            for table in tables(graph_module):
                if not (_is_added(table, graph_module) or _counts(table, graph_module)):
                    raise PassRefused(
                        f"bound positions: {table.reader.name} reads a table of {rows_of(table, graph_module).dtype}, "
                        "which has no rows that add nothing. Use positions 'clamp'."
                    )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = tables(graph_module)
        if not found:
            return PassResult.unchanged(graph_module, "no table is indexed by a growing position")
        if self.mode == "refuse":
            rows = min(t.limit for t in found)
            return PassResult.unchanged(graph_module, f"lengths past {rows} positions are refused")
        while found:  # a bounded table of positions bounds the tables that its values index
            self._bound(graph_module, found[0])
            found = tables(graph_module)
        return PassResult(graph_module=graph_module, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        self._expect(table_rows(graph_module) is None, "every table to be read with a bound")

    def _bound(self, graph_module: fx.GraphModule, table: Table) -> None:
        graph, reader = graph_module.graph, table.reader
        behind, added = dims_behind(table, graph_module), _is_added(table, graph_module)
        with graph.inserting_before(reader):
            if table.argument is None:
                source, end = reader.args[0], reader.args[3]
                assert isinstance(source, fx.Node)
                device = source.meta["val"].device if "val" in source.meta else torch.device("cpu")
                steps = graph.call_function(aten.arange.default, (end,), {"dtype": torch.int64, "device": device})
                dim, inside = table_dim(table, graph_module), self._inside(graph, steps, table)
                selected = select_steps(graph, source, dim, inside)
                selected.meta = dict(reader.meta)
                reader.replace_all_uses_with(selected)
                graph.erase_node(reader)
            else:
                steps, selected = table.indices, reader
                _read_by(table, self._inside(graph, steps, table))
        if self.mode == "drop":
            with graph.inserting_before(selected.next):
                self._past(graph, selected, steps, table.rows, behind, added)

    def _past(self, graph: fx.Graph, selected: fx.Node, steps: fx.Node, rows: int, behind: int, added: bool) -> None:
        """What is read past the last row: zeros, or the steps after it on top of the last position."""
        if added:
            past = graph.call_function(aten.ge.Scalar, (steps, rows))
        else:
            past = graph.call_function(aten.sub.Tensor, (steps, rows - 1))
            past = graph.call_function(aten.clamp.default, (past, 0))
        for _ in range(behind):
            past = graph.call_function(aten.unsqueeze.default, (past, -1))
        if added:
            whole = graph.call_function(aten.masked_fill.Scalar, (selected, past, 0))
        else:
            whole = graph.call_function(aten.add.Tensor, (selected, past))
        whole.meta = dict(selected.meta)
        selected.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)

    def _inside(self, graph: fx.Graph, indices: fx.Node, table: Table) -> fx.Node:
        if self.mode in ("clamp", "drop"):
            bounded = graph.call_function(aten.clamp.default, (indices, None, table.rows - 1))
        elif table.first == 0:
            bounded = graph.call_function(aten.remainder.Scalar, (indices, table.rows))
        else:  # rows before the first are not positions (OPT keeps two for padding)
            steps = graph.call_function(aten.sub.Tensor, (indices, table.first))
            wrapped = graph.call_function(aten.remainder.Scalar, (steps, table.rows - table.first))
            bounded = graph.call_function(aten.add.Tensor, (wrapped, table.first))
        bounded.meta = {k: v for k, v in indices.meta.items() if k in ("val", "nn_module_stack")}
        return bounded


def _read_by(table: Table, indices: fx.Node) -> None:
    """Let the table's reader read by other indices."""
    assert table.argument is not None
    given: Any = table.reader.args[table.argument]
    listed = isinstance(given, (list, tuple))
    table.reader.update_arg(table.argument, [None if i is None else indices for i in given] if listed else indices)


def _is_added(table: Table, graph_module: fx.GraphModule) -> bool:
    return rows_of(table, graph_module).is_floating_point()


def _counts(table: Table, graph_module: fx.GraphModule) -> bool:
    """Row t holds first + t: positions that index the next table."""
    rows = rows_of(table, graph_module)
    if rows.dtype not in (torch.int32, torch.int64) or table.rows < 2:
        return False
    return bool((rows.diff(dim=table_dim(table, graph_module)) == 1).all())
