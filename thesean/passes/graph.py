"""Small tools on FX graphs that several passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


def attribute(module: nn.Module, path: str) -> Any:
    """`attribute(m, "h.0.weight")`: what a get_attr node reads."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def erase_dead(graph: fx.Graph) -> int:
    """Erase every node without users, in reverse order, and return how many.

    Not `eliminate_dead_code`: that keeps dropout and attention, which count as impure because they may draw random
    numbers.
    """
    erased = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
            erased += 1
    return erased


def owner(node: fx.Node) -> str:
    """The path of the module whose forward made this node; "" for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return "" if path.startswith("_empty_nn_module_stack") else str(path)


def leaf_nodes(value: Any) -> list[fx.Node]:
    """The nodes in a nested argument, in order."""
    return [v for v in pytree.tree_leaves(value) if isinstance(v, fx.Node)]


@torch.no_grad()
def record(graph_module: fx.GraphModule, inputs: dict[str, torch.Tensor]) -> dict[fx.Node, Any]:
    """Run once and keep every node's value: for probing on small inputs."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(graph_module, garbage_collect_values=False).run(*inputs.values())
    return values


@torch.no_grad()
def evaluate(nodes: Iterable[fx.Node], values: dict[fx.Node, Any], given: dict[fx.Node, Any], wanted: fx.Node) -> Any:
    """The value of `wanted` when `given` replaces recorded values: `nodes` are run in order, all else is recorded."""
    env = dict(given)
    look_up: Callable[[fx.Node], Any] = lambda n: env[n] if n in env else values[n]  # noqa: E731
    if wanted in env:
        return env[wanted]
    for node in nodes:
        if node in env:
            continue
        args = fx.map_arg(node.args, look_up)
        kwargs = fx.map_arg(node.kwargs, look_up)
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if node is wanted:
            break
    return env[wanted]
