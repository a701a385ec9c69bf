"""Copy a graph, and clear away what nothing reads any more."""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import fx, nn

from thesean.passes.graph.nodes import attribute, is_write

Module = TypeVar("Module", bound=nn.Module)


def erase_dead(graph: fx.Graph) -> None:
    """Erase every node without users, in reverse order. What writes into an input has uses.

    Not `eliminate_dead_code`: that keeps dropout and attention, which count as impure because they may draw random
    numbers.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not is_write(node):
            graph.erase_node(node)


def in_order(graph: fx.Graph) -> None:
    """Move nodes that stand before what they read behind it; all others keep their order."""
    place = {node: at for at, node in enumerate(graph.nodes)}
    left = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(place[node], node) for node, count in left.items() if not count]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for user in node.users:
            left[user] -= 1
            if not left[user]:
                heapq.heappush(ready, (place[user], user))
    for before, node in itertools.pairwise(order):
        before.append(node)


def end_of_call(node: fx.Node) -> fx.Node:
    """Where what reads a node may stand first: behind all inputs of the graph, where it is one of them."""
    return node.graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What `erase_dead` would leave."""
    alive: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or is_write(node) or not alive.isdisjoint(node.users):
            alive.add(node)
    return alive


def free_names(graph_module: fx.GraphModule, stem: str) -> Iterator[str]:
    """stem_0, stem_1... that the graph has no attribute of."""
    return (name for n in itertools.count() if not hasattr(graph_module, name := f"{stem}_{n}"))


def beside(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with the same node names, without what nothing reads; it shares modules and parameters."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    erase_dead(graph)
    new = fx.GraphModule(graph_module, graph)
    new.meta.update(graph_module.meta)
    return new


def clone(graph_module: fx.GraphModule, share: bool = False) -> fx.GraphModule:
    """A copy with the same node names, and with parameters of its own; tied parameters stay tied.

    With `share`, parameters and buffers are the same tensors: nothing may change them until `unshare`.
    """
    memo = {id(t): t for t in _tensors(graph_module)} if share else {}
    new = copy.deepcopy(graph_module, memo)
    _renew_values(new)
    return new


def frozen(module: Module) -> Module:
    """A copy on the CPU whose parameters require no gradients. Where the others are there already they have the same
    memory: nothing may write into them. Buffers, which a forward may write into, are the copy's own.
    """
    memo = {id(p): nn.Parameter(p.detach().cpu(), requires_grad=False) for p in module.parameters()}
    new = copy.deepcopy(module, memo).cpu()
    if isinstance(new, fx.GraphModule):
        _renew_values(new)
    return new


@torch.no_grad()
def unshare(graph_module: fx.GraphModule, other: nn.Module) -> None:
    """Give a module its own copies of the parameters and buffers that `other` has too, one at a time, in place."""
    shared = {id(t) for t in _tensors(other)}
    copies: dict[int, torch.Tensor] = {}  # tied ones stay tied
    for module in graph_module.modules():
        for held in (module._parameters, module._buffers):
            tensors: dict[str, Any] = held
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in shared:
                    copies.setdefault(id(tensor), copy.deepcopy(tensor))
                    tensors[name] = copies[id(tensor)]
    _renew_values(graph_module)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _renew_values(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.find_nodes(op="get_attr"):
        node.meta["val"] = attribute(graph_module, str(node.target))


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
