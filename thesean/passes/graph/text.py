"""A graph as people read it: one line a node. Golden tests compare it, `dump_graphs` writes it."""

from __future__ import annotations

from collections.abc import Container
from operator import getitem

from torch import fx


def text(graph: fx.Graph, only: Container[fx.Node] | None = None) -> list[str]:
    """`linear = aten.linear.default(x, weight, bias)` for each node in order, or for each of `only`. No types."""
    return [_line(node) for node in graph.nodes if only is None or node in only]


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    if node.op in ("placeholder", "get_attr"):
        return f"{node.name} = {node.op} {node.target}"
    called = "getitem" if node.target is getitem else str(node.target)
    arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    return f"{node.name} = {called}({arguments})"
