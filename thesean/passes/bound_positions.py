"""Keep positions inside the guide's tables: a recurrence runs past their last row, an absolute position can't.

T time
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.analyse.positions import Table, prefix_dim, table_rows, tables
from thesean.passes.base import Pass, PassResult

aten = torch.ops.aten

PositionMode = Literal["clamp", "wrap", "refuse"]
_MODES = get_args(PositionMode)


@dataclass(frozen=True)
class BoundPositions(Pass):
    """table[t]  =>  table[min(t, rows - 1)] ("clamp") or table[t mod rows] ("wrap"), for counted positions only.

    Indices that come from the caller's data stay as they are. A slice table[:T] becomes table[t] first. Lengths that
    the table holds give the same numbers as before. "refuse" changes nothing: past the table the guide's own error
    stands. Apply it before ThreadState, whose offset then enters upstream of the bound.
    """

    in_place = True

    mode: PositionMode = "clamp"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self.mode not in _MODES:
            raise PassRefused(f"bound positions: expected one of {', '.join(_MODES)}, found {self.mode!r}.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = tables(graph_module)
        if not found:
            return PassResult(
                graph_module=graph_module, modified=False, reason="no table is indexed by a growing position"
            )
        if self.mode == "refuse":
            rows = min(t.limit for t in found)
            return PassResult(
                graph_module=graph_module, modified=False, reason=f"lengths past {rows} positions are refused"
            )
        while found:  # a bounded table of positions bounds the tables that its values index
            self._bound(graph_module, found[0])
            found = tables(graph_module)
        return PassResult(graph_module=graph_module, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        self._expect(table_rows(graph_module) is None, "every table to be read with a bound")

    def _bound(self, graph_module: fx.GraphModule, table: Table) -> None:
        graph, reader = graph_module.graph, table.reader
        with graph.inserting_before(reader):
            if table.argument is None:
                source, end = reader.args[0], reader.args[3]
                assert isinstance(source, fx.Node)
                device = source.meta["val"].device if "val" in source.meta else torch.device("cpu")
                steps = graph.call_function(aten.arange.default, (end,), {"dtype": torch.int64, "device": device})
                selected = graph.call_function(
                    aten.index_select.default,
                    (source, prefix_dim(table, graph_module), self._inside(graph, steps, table)),
                )
                selected.meta = dict(reader.meta)
                reader.replace_all_uses_with(selected)
                graph.erase_node(reader)
            else:
                _read_by(table, self._inside(graph, table.indices, table))

    def _inside(self, graph: fx.Graph, indices: fx.Node, table: Table) -> fx.Node:
        if self.mode == "clamp":
            bounded = graph.call_function(aten.clamp.default, (indices, None, table.rows - 1))
        elif table.first == 0:
            bounded = graph.call_function(aten.remainder.Scalar, (indices, table.rows))
        else:  # rows before the first are not positions (OPT keeps two for padding)
            steps = graph.call_function(aten.sub.Tensor, (indices, table.first))
            wrapped = graph.call_function(aten.remainder.Scalar, (steps, table.limit))
            bounded = graph.call_function(aten.add.Tensor, (wrapped, table.first))
        bounded.meta = {k: v for k, v in indices.meta.items() if k in ("val", "nn_module_stack")}
        return bounded


def _read_by(table: Table, indices: fx.Node) -> None:
    """Let the table's reader read by other indices."""
    assert table.argument is not None
    given: Any = table.reader.args[table.argument]
    listed = isinstance(given, (list, tuple))
    table.reader.update_arg(table.argument, [None if i is None else indices for i in given] if listed else indices)
