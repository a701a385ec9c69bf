"""Copy a graph, and clear away what nothing reads any more."""

from __future__ import annotations

import copy

from torch import fx

from thesean.passes.graph.nodes import attribute, is_write


def erase_dead(graph: fx.Graph) -> int:
    """Erase every node without users, in reverse order, and return how many. What writes into an input has uses.

    Not `eliminate_dead_code`: that keeps dropout and attention, which count as impure because they may draw random
    numbers.
    """
    erased = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not is_write(node):
            graph.erase_node(node)
            erased += 1
    return erased


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What `erase_dead` would leave."""
    alive: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or is_write(node) or not alive.isdisjoint(node.users):
            alive.add(node)
    return alive


def clone(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with parameters of its own and the same node names; tied parameters stay tied."""
    new = copy.deepcopy(graph_module)
    for node in new.graph.find_nodes(op="get_attr"):
        node.meta["val"] = attribute(new, str(node.target))
    return new


def clean(graph_module: fx.GraphModule) -> None:
    """Erase what nothing reads any more, nodes and parameters.

    With its exit all of a region is dead, and what took no more than a size of it. Where such a size is read elsewhere,
    it stays, and what it was taken of.
    """
    erase_dead(graph_module.graph)
    drop_unread(graph_module)


def drop_unread(graph_module: fx.GraphModule) -> None:
    """Delete parameters and buffers that no node reads any more, then empty containers."""
    read = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    called = tuple(f"{n.target}." for n in graph_module.graph.nodes if n.op == "call_module")
    for path in [n for n, _ in (*graph_module.named_parameters(remove_duplicate=False), *graph_module.named_buffers())]:
        if path not in read and not path.startswith(called):
            holder, _, leaf = path.rpartition(".")
            delattr(graph_module.get_submodule(holder), leaf)
    graph_module.delete_all_unused_submodules()
