"""A stretch of a graph as a module of its own: to run, export or time one part by itself.

B batch, T time
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Dim, InputSpec, Signature

aten = torch.ops.aten

_ENTRY = "hidden"


@dataclass(frozen=True, kw_only=True)
class Extract:
    """`graph_module(hidden, side_0, ...)` is the stretch from `entry` to `exit`; parameters are the original's.

    `signature` names its inputs. The sides are what it reads past its entry and does not compute from it: masks,
    position tables, rotary tables; the whole network makes those once for all of its parts.
    """

    graph_module: fx.GraphModule
    signature: Signature
    original: fx.GraphModule
    sides: tuple[str, ...]  # the nodes of `original` that the side inputs stand for, in order
    dims: tuple[tuple[Any, ...], ...]  # each input's shape in `original`'s own symbols

    def inputs(self, guide: Signature, sizes: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
        """The hidden state standard normal, the sides as the original makes them from random inputs of `sizes`."""
        symbols: dict[str, str] = self.original.meta["symbols"]
        shape = [_size(d, symbols, sizes) for d in self.dims[0]]
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        dtype = self.signature.inputs[0].dtype
        values = {_ENTRY: hidden.to(dtype) if dtype.is_floating_point else hidden}
        if self.sides:
            device = next((str(p.device) for p in self.original.parameters()), "cpu")
            given = guide.random_inputs(sizes, seed, device)
            # side nodes are few and shallow: the hidden states are not computed for them
            prefix = intermediates(self.original, self.sides, with_output=False)
            made = record(prefix, given)[prefix.graph.output_node()]
            values |= {f"side_{i}": made[name].detach().cpu() for i, name in enumerate(self.sides)}
        return values


def extract(graph_module: fx.GraphModule, entry: fx.Node, exit_: fx.Node) -> Extract:
    """Everything that `exit_` computes from `entry`. The graph stays as it was.

    Sizes come from the inputs' own shapes. Raises PassRefused where `exit_` does not depend on `entry`.
    """
    graph = graph_module.graph
    inside = _downstream(graph, entry)
    if exit_ not in inside or exit_ is entry:
        raise PassRefused(f"extract: {exit_.name} is not computed from {entry.name}.")
    constant = _constants(graph)
    copied: set[fx.Node] = set()
    sides: dict[fx.Node, None] = {}
    front = [exit_]
    while front:
        node = front.pop()
        if node is entry or node in copied or node in sides:
            continue
        if _is_size(node) and _place_of(node, entry) is not None:
            copied.add(node)
        elif node in inside or node in constant or (_is_size(node) and node.op == "call_function"):
            copied.add(node)
            front.extend(node.all_input_nodes)
        else:
            sides[node] = None
    order = {n: i for i, n in enumerate(graph.nodes)}
    given = [entry, *sorted(sides, key=order.__getitem__)]
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for name, node in zip([_ENTRY, *(f"side_{i}" for i in range(len(sides)))], given, strict=True):
        mapping[node] = new.placeholder(name)
        mapping[node].meta = {"val": node.meta["val"]}
    for node in sorted(copied, key=order.__getitem__):
        place = _place_of(node, entry) if _is_size(node) else None
        if place is not None:
            mapping[node] = new.call_function(aten.sym_size.int, (mapping[entry], place))
            mapping[node].meta = dict(node.meta)
        else:
            mapping[node] = new.node_copy(node, mapping.__getitem__)
    new.output((mapping[exit_],))
    symbols: dict[str, str] = graph_module.meta["symbols"]
    module = fx.GraphModule(graph_module, new)
    module.meta["symbols"] = symbols
    return Extract(
        graph_module=module,
        signature=Signature(inputs=tuple(_spec(str(mapping[n].target), n, symbols) for n in given)),
        original=graph_module,
        sides=tuple(n.name for n in given[1:]),
        dims=tuple(tuple(n.meta["val"].shape) for n in given),
    )


def _downstream(graph: fx.Graph, entry: fx.Node) -> set[fx.Node]:
    """What the entry's values flow into; its sizes alone do not count."""
    found = {entry}
    for node in graph.nodes:
        if node.op != "output" and not _is_size(node) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Parameters, buffers and what is computed from nothing else, such as a transposed weight."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(i in found for i in node.all_input_nodes)):
            found.add(node)
    return found


def _is_size(node: fx.Node) -> bool:
    if node.target is aten.sym_size.int:
        return True
    return "val" in node.meta and not isinstance(node.meta["val"], (torch.Tensor, tuple, list))


def _place_of(size: fx.Node, entry: fx.Node) -> int | None:
    """The dimension of the entry's shape that this size is."""
    value = size.meta.get("val")
    if not isinstance(value, torch.SymInt):
        return None
    shape = [str(d) if isinstance(d, torch.SymInt) else None for d in entry.meta["val"].shape]
    return shape.index(str(value)) if str(value) in shape else None


def _spec(name: str, node: fx.Node, symbols: dict[str, str]) -> InputSpec:
    value = node.meta["val"]
    shape: list[Dim] = [symbols.get(str(d), str(d)) if isinstance(d, torch.SymInt) else int(d) for d in value.shape]
    return InputSpec(name=name, dtype=value.dtype, shape=tuple(shape))


def _size(dim: Any, symbols: dict[str, str], sizes: dict[str, int]) -> int:
    """A dimension's size where the signature's symbols have these; it may be an expression in them."""
    if not isinstance(dim, torch.SymInt):
        return int(dim)
    expression = dim.node.expr
    return int(expression.subs({s: sizes[symbols[str(s)]] for s in expression.free_symbols}))
