"""Small tools on FX graphs that several passes share."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from thesean.passes.graph import unchecked


def attribute(module: nn.Module, path: str) -> Any:
    """`attribute(m, "h.0.weight")`: what a get_attr node reads."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An operator's argument, given by position, by name or not at all."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def compute(node: fx.Node, look_up: Callable[[fx.Node], Any]) -> Any:
    """A called function's value, where `look_up` knows its inputs'."""
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), look_up)
    unchecked.check(node.target, args, kwargs)
    return node.target(*args, **kwargs)


class LookingInterpreter(fx.Interpreter):
    """torch's, which looks first where an operator itself doesn't: the graph may be one from a file."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        unchecked.check(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def is_write(node: fx.Node) -> bool:
    """An operator that writes into one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def mark_constants(graph: fx.Graph) -> None:
    """`meta["constant"]` for what is computed from parameters and buffers alone, such as a transposed weight."""
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(i.op == "get_attr" or "constant" in i.meta for i in inputs):
            node.meta["constant"] = True


def constants_of(node: fx.Node) -> set[fx.Node]:
    """The get_attr nodes that a constant is computed from; none for what an input's values or sizes flow into."""
    if node.op == "get_attr":
        return {node}
    if "constant" not in node.meta:
        return set()
    return {c for i in node.all_input_nodes for c in constants_of(i)}


def owner(node: fx.Node) -> str:
    """The path of the module whose forward made this node; "" for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return "" if path.startswith("_empty_nn_module_stack") else str(path)


def named_dim(size: int | torch.SymInt, symbols: dict[str, str]) -> int | str:
    """A size with the signature's names for dynamic dimensions: "time", or "batch*time" for a flattened one."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match.group(), match.group()), str(size))


def calls_of(node: fx.Node) -> dict[str, str]:
    """Module path -> which call of it this node belongs to, for the modules around a node; "" is the first call."""
    stack = node.meta.get("nn_module_stack") or {}
    return {str(path): key.partition("@")[2] for key, (path, _) in stack.items()}


def above(ends: Iterable[fx.Node], known: Container[fx.Node] = ()) -> set[fx.Node]:
    """`ends` and all that they are computed from, down to what is known."""
    found: set[fx.Node] = set()
    front = list(ends)
    while front:
        node = front.pop()
        if node not in found and node not in known:
            found.add(node)
            front.extend(node.all_input_nodes)
    return found


def from_inputs(graph: fx.Graph) -> set[fx.Node]:
    """What is computed from the inputs, and not from parameters and constants alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def leaf_values(output: Any) -> list[torch.Tensor]:
    """The tensors of a nested output, in order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]


def leaf_nodes(value: Any) -> list[fx.Node]:
    """The nodes in a nested argument, in order."""
    return [v for v in pytree.tree_leaves(value) if isinstance(v, fx.Node)]


def is_complex(node: fx.Node) -> bool:
    """Whether it is a complex tensor, or one of its values is."""
    return any(isinstance(v, torch.Tensor) and v.is_complex() for v in pytree.tree_leaves(node.meta.get("val")))
