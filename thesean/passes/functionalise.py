"""Operators that write into their input become operators that return: a recorded value must stay what it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.writes import is_view, twin_of


@dataclass(frozen=True)
class Functionalise(Pass):
    """y = op_(x)  =>  y = op(x), and whatever reads x later reads y, as it would in memory.

    What a forward would leave behind in its inputs and buffers is left out: neither is ours to change. Writes into a
    view of another tensor stay: what else they reach can't be read off one node. `writes` finds them.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        order = {n: i for i, n in enumerate(graph_module.graph.nodes)}
        changed = False
        for node in list(graph_module.graph.nodes):
            if _leaves_a_result_behind(node, order):
                graph_module.graph.erase_node(node)
                changed = True
                continue
            twin = twin_of(node)
            if twin is None or not _owns_memory(node.args[0], order[node], order):
                continue
            source = node.args[0]
            node.target = twin
            later = [u for u in source.users if order[u] > order[node]]
            for user in later:
                user.replace_input_with(source, node)
            changed = True
        if not changed:
            return PassResult.unchanged(graph_module, "no operator writes into its input")
        return PassResult(graph_module=graph_module, modified=True)


def _leaves_a_result_behind(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """A last copy into an input or a buffer, for the caller or for the next call to find: torch.export puts it there
    when a forward wrote into it. Neither is ours to change.
    """
    if node.target is not torch.ops.aten.copy_.default or node.users:
        return False
    kept = node.args[0]
    return (
        isinstance(kept, fx.Node)
        and kept.op in ("placeholder", "get_attr")
        and max(map(order.__getitem__, kept.users)) == order[node]
        and _owns_memory(kept, order[node], order)
    )


def _owns_memory(source: Any, now: int, order: dict[fx.Node, int]) -> bool:
    """Whether nothing that shares memory with `source` is read after the write, but `source` itself.

    A buffer that a forward writes to (a counter) keeps its value from call to call no longer: a graph has no memory.
    """
    front = [_origin(source)]
    for shared in front:
        if shared is not source and any(order[reader] > now for reader in shared.users):
            return False
        front.extend(u for u in shared.users if is_view(u) and order[u] < now)
    return True


def _origin(node: fx.Node) -> fx.Node:
    """What a view, or a view of it, is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node
