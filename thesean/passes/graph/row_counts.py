"""Let counts differ from row to row: what counts the steps of a whole batch, (T,), becomes (B, T).

B batch, T time, N rows of a table, D width
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

aten = torch.ops.aten

# operators on each number by itself
_ELEMENTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar,
    aten.clamp.default, aten.remainder.Scalar, aten.ge.Scalar, aten.to.dtype, aten._to_copy.default,
    aten.to.device, aten.contiguous.default, aten.clone.default,
}  # fmt: skip
_FIRST_DIM = {aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.expand.default}

Shapes = Mapping[str, tuple[int, ...]]


def takes_rows(node: fx.Node, shapes: Shapes, batch: int) -> bool:
    """Whether everything that reads a count of steps takes one that differs from row to row."""
    shape = shapes[node.name]
    if len(shape) == 2 and shape[0] in (1, batch):
        return True
    if len(shape) != 1:
        return False
    for user in node.users:
        made = shapes.get(user.name)
        if user.target in _ELEMENTWISE and made == shape and len(user.all_input_nodes) == 1:
            if not takes_rows(user, shapes, batch):
                return False
        elif user.target in _FIRST_DIM:
            if not _is_row(made or (), shape, batch) and not _adds_last(user):
                return False
        elif user.target is aten.index_select.default:
            table = user.args[0]
            if not isinstance(table, fx.Node) or not is_row_table(shapes[table.name], int(user.args[1])):  # type: ignore[arg-type]
                return False
        elif user.target is not aten.embedding.default:
            return False
    return True


def is_row_table(shape: tuple[int, ...], dim: int) -> bool:
    """(N, D) or (1, N, D), read along N."""
    if len(shape) not in (2, 3):
        return False
    dim %= len(shape)
    return (len(shape) == 2 and dim == 0) or (len(shape) == 3 and dim == 1 and shape[0] == 1)


def select_steps(graph: fx.Graph, table: fx.Node, dim: int, index_T: fx.Node) -> fx.Node:
    """A table's steps along `dim`, at the graph's insertion point. ONNX selects of real numbers alone."""
    value = table.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_complex():
        return graph.call_function(aten.index_select.default, (table, dim, index_T))
    pairs = graph.call_function(aten.view_as_real.default, (table,))
    pairs = graph.call_function(aten.index_select.default, (pairs, dim % value.ndim, index_T))
    return graph.call_function(aten.view_as_complex.default, (pairs,))


def read_rows(graph: fx.Graph, table: fx.Node, rank: int, index_BT: fx.Node) -> fx.Node:
    """(B, T, D) of such a table, at the graph's insertion point."""
    if rank == 3:
        table = graph.call_function(aten.select.int, (table, 0, 0))
    return graph.call_function(aten.embedding.default, (table, index_BT))


def give_rows(graph: fx.Graph, node: fx.Node, moved: fx.Node, shapes: Shapes) -> None:
    """Let all readers of `node`, a count that `takes_rows`, read `moved` instead, which is (B, T)."""
    for user in [u for u in node.users if u is not moved]:
        if _repeats_rows(user, node, shapes):
            user.replace_all_uses_with(moved)
            graph.erase_node(user)
        elif len(shapes[node.name]) == 2 or user.target is aten.embedding.default:
            user.replace_input_with(node, moved)
        elif user.target in _FIRST_DIM and not _adds_last(user):
            for reader in [r for r in user.users if _repeats_rows(r, user, shapes)]:
                reader.replace_all_uses_with(moved)
                graph.erase_node(reader)
            row = moved
            with graph.inserting_before(user):
                for _ in shapes[user.name][2:]:
                    row = graph.call_function(aten.unsqueeze.default, (row, -1))
            user.replace_all_uses_with(row)
            graph.erase_node(user)
        elif user.target is aten.index_select.default:
            table = user.args[0]
            assert isinstance(table, fx.Node)
            with graph.inserting_before(user):
                rows = read_rows(graph, table, len(shapes[table.name]), moved)
            rows.meta = dict(user.meta)
            user.replace_all_uses_with(rows)
            graph.erase_node(user)
        else:
            user.replace_input_with(node, moved)
            give_rows(graph, user, user, shapes)


def _repeats_rows(node: fx.Node, row: fx.Node, shapes: Shapes) -> bool:
    """(1, T) -> (B, T)"""
    made, given = shapes.get(node.name, ()), shapes[row.name]
    return node.target is aten.repeat.default and len(made) == len(given) == 2 and given[0] == 1 and made[1] == given[1]


def _is_row(made: tuple[int, ...], shape: tuple[int, ...], batch: int) -> bool:
    """(T) -> (1, T), or with ones behind it (1, T, 1)."""
    return made[:1] in ((1,), (batch,)) and made[1:2] == shape and all(size == 1 for size in made[2:])


def _adds_last(node: fx.Node) -> bool:
    """(T) -> (T, 1), and (B, T) -> (B, T, 1) as well."""
    return bool(node.target is aten.unsqueeze.default and node.args[1] == -1)
