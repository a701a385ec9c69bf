"""Find what counts positions in a graph: values that sizes alone decide, and tables that they index.

A recurrence knows no end and no start of its own; a position table does. Nothing here looks at names or metadata, so
a graph loaded from a file is read as well as a captured one.

T time
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.halves import HELD
from thesean.passes.graph.nodes import argument, attribute, compute, leaf_nodes

aten = torch.ops.aten

# Two lengths tell a value that grows with T from one that doesn't, and, so far apart, from one that grows by half of it
# behind a stride.
_SHORT, _LONG = 2, 7
_BATCH = 5
_HELD = 4  # of what is held, whatever the length

_MAKERS = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default)
# operator -> where its table and its indices stand
_READERS: dict[Any, tuple[int, int]] = {
    aten.embedding.default: (0, 1),
    aten.index_select.default: (0, 2),
    aten.gather.default: (0, 2),
    aten.index.Tensor: (0, 1),
}


_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
_COMPARISONS = (aten.ne.Scalar, aten.eq.Scalar, aten.ne.Tensor, aten.eq.Tensor, aten.gt.Scalar, aten.ge.Scalar)


class _Unknown:
    """The value depends on what the inputs hold."""


_UNKNOWN = _Unknown()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of which each further step reads a further row, without bound: lengths past `limit` read out of range.

    `first` is the lowest row that is read. `argument` is the position of the indices among `reader`'s arguments; None
    when a slice from the first row on reads the table.
    """

    reader: fx.Node
    argument: int | None
    rows: int
    first: int
    limit: int

    @property
    def indices(self) -> fx.Node:
        """The node that says which rows are read."""
        assert self.argument is not None
        given = self.reader.args[self.argument]
        (found,) = leaf_nodes(given)
        return found


@dataclass(frozen=True, kw_only=True)
class Counter:
    """A node that counts steps: it holds `first + slope * t`, the same whatever the inputs hold."""

    node: fx.Node
    slope: float


def size_values(
    graph_module: fx.GraphModule, time: int, ones: frozenset[fx.Node] = frozenset()
) -> Callable[[fx.Node], Any]:
    """A look-up of the values that sizes alone decide, at this length; `None` for all that inputs' values enter.

    `ones` are masks that are taken to be (batch, time) of ones.
    """
    known: dict[fx.Node, Any] = {n: torch.ones(_BATCH, time, dtype=torch.int64) for n in ones}

    def value_of(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(graph_module, str(node.target))
        if node.op != "call_function":
            return _UNKNOWN
        if node.target is aten.sym_size.int:
            held = node.all_input_nodes[0].meta.get(HELD, False)
            return _BATCH if node.args[1] == 0 else _HELD if held else time
        arguments = [known.get(i, _UNKNOWN) for i in node.all_input_nodes]
        if any(a is _UNKNOWN for a in arguments):
            return _UNKNOWN
        try:
            with torch.no_grad():
                return compute(node, known.get)
        except (RuntimeError, IndexError, TypeError):
            return _UNKNOWN  # too short for this operator, or a shape that only real inputs have

    def look_up(wanted: fx.Node) -> Any:
        front = [wanted]
        while front:
            node = front[-1]
            missing = [] if node.target is aten.sym_size.int else [i for i in node.all_input_nodes if i not in known]
            if node in known or not missing:
                front.pop()
                if node not in known:
                    known[node] = value_of(node)
            else:
                front.extend(missing)
        value = known[wanted]
        return None if value is _UNKNOWN else value

    return look_up


def counted_masks(graph_module: fx.GraphModule) -> frozenset[fx.Node]:
    """Masks of which a running sum counts the visible steps: with nothing hidden it counts as far as it ever can."""
    return frozenset(mask for _, mask in running_sums(graph_module))


def running_sums(graph_module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """(sum, mask): the running sums of what inputs' values decide, which count the visible steps."""
    short = size_values(graph_module, _SHORT)
    found = []
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.cumsum.default):
        mask = node.args[0]
        while isinstance(mask, fx.Node) and mask.target in _CASTS:
            mask = mask.args[0]
        if isinstance(mask, fx.Node) and short(mask) is None and _is_mask(graph_module, mask):
            found.append((node, mask))
    return found


def _is_mask(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """An integer input that indexes nothing itself, or a comparison: no hidden state's running sum is a count."""
    if node.op == "placeholder":
        return all(user.target not in _READERS for user in node.users)
    return node.target in _COMPARISONS


def tables(graph_module: fx.GraphModule) -> list[Table]:
    """Every table that a count of steps reads without bound, in the graph's order."""
    masks = counted_masks(graph_module)
    short, long = size_values(graph_module, _SHORT, masks), size_values(graph_module, _LONG, masks)
    found = []
    for node in graph_module.graph.nodes:
        if node.target is aten.slice.Tensor and _is_prefix(node, short, long):
            value = short(node.args[0])
            rows = value.shape[_dim(node, value)]
            limit = _SHORT + rows - short(argument(node, 3, "end"))
            found.append(Table(reader=node, argument=None, rows=rows, first=0, limit=limit))
        elif node.target in _READERS:
            table, index = _READERS[node.target]
            given = leaf_nodes(node.args[index])
            if len(given) != 1:
                continue
            indices = given[0]
            before, after = short(indices), long(indices)
            if not (_is_integer(before) and _is_integer(after) and after.max() - before.max() == _LONG - _SHORT):
                continue
            value = short(node.args[table])
            if value is None:
                continue
            dim = _indexed_dim(node, value)
            rows, first = int(value.shape[dim]), int(before.min())
            limit = _SHORT + rows - 1 - int(before.max())  # a token of the network's own takes a row, too
            if not _is_bounded(graph_module, indices, rows, limit, masks):
                found.append(Table(reader=node, argument=index, rows=rows, first=first, limit=limit))
    return found


def table_rows(graph_module: fx.GraphModule) -> int | None:
    """The longest sequence that the position tables hold; None where there is no table, or none without a bound."""
    return min((t.limit for t in tables(graph_module)), default=None)


def counters(graph_module: fx.GraphModule) -> list[Counter]:
    """aranges over time and running sums of constants: the places where a chunk must go on counting."""
    short, long = size_values(graph_module, _SHORT), size_values(graph_module, _LONG)
    found = []
    for node in graph_module.graph.nodes:
        if node.target not in _MAKERS:
            continue
        before, after = short(node), long(node)
        if not (isinstance(after, torch.Tensor) and isinstance(before, torch.Tensor)):
            continue
        if after.shape[-1] != _LONG or before.shape[-1] != _SHORT or after.is_complex():
            continue  # not over time, which the last dimension of a count is
        steps = after.double().diff()
        slope = steps.flatten()[0]
        if bool((steps == slope).all()) and slope != 0 and torch.equal(after[..., :_SHORT], before):
            found.append(Counter(node=node, slope=slope.item()))
    return found


def _is_prefix(node: fx.Node, short: Callable[[fx.Node], Any], long: Callable[[fx.Node], Any]) -> bool:
    """table[:T], or a fixed number of rows more or less, of a table that no size enters."""
    source, start, end = node.args[0], argument(node, 2, "start"), argument(node, 3, "end")
    step = argument(node, 4, "step", 1)
    if not isinstance(end, fx.Node) or start not in (None, 0) or step != 1 or not isinstance(source, fx.Node):
        return False
    value, again = short(source), long(source)
    if not isinstance(value, torch.Tensor) or not isinstance(again, torch.Tensor) or value.shape != again.shape:
        return False
    before, after = short(end), long(end)
    return isinstance(before, int) and isinstance(after, int) and after - before == _LONG - _SHORT


def _dim(node: fx.Node, value: torch.Tensor) -> int:
    return int(argument(node, 1, "dim", 0)) % value.ndim


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64) and value.numel() > 0


def _indexed_dim(node: fx.Node, value: torch.Tensor) -> int:
    """The dimension of the table that the indices go along."""
    given: Any = node.args[1]
    if node.target is aten.embedding.default:
        return 0
    if node.target is aten.index.Tensor:
        return next(d for d, i in enumerate(given) if i is not None)
    return int(given) % value.ndim


def _is_bounded(graph_module: fx.GraphModule, indices: Any, rows: int, limit: int, masks: frozenset[fx.Node]) -> bool:
    """One step past the table, does the index still fall inside?"""
    beyond = size_values(graph_module, limit + 1, masks)(indices)
    return beyond is not None and bool(beyond.max() < rows)


def rows_of(table: Table, graph_module: fx.GraphModule) -> torch.Tensor:
    """The table itself."""
    value = size_values(graph_module, _SHORT)(table.reader.args[0])  # type: ignore[arg-type]
    assert isinstance(value, torch.Tensor)
    return value


def table_dim(table: Table, graph_module: fx.GraphModule) -> int:
    """The dimension of the table along which it is read."""
    value = rows_of(table, graph_module)
    return _dim(table.reader, value) if table.argument is None else _indexed_dim(table.reader, value)


def dims_behind(table: Table, graph_module: fx.GraphModule) -> int:
    """How many dimensions follow those of the positions in what the reader gives."""
    if table.reader.target is aten.gather.default:  # whose indices have all dimensions
        return 0
    return rows_of(table, graph_module).ndim - table_dim(table, graph_module) - 1
