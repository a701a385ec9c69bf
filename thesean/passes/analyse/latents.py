"""What an attention's queries, keys and values are linear maps of, where that is not what its block reads alone.

A latent that is normed before keys and values are made of it (DeepSeek-AI 2024, section 2.1) is none of a block's
input. Between it and the heads there are maps, views and rotations, and so there are between the heads and what else
they read.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from typing import NamedTuple

import networkx as nx
import torch
from torch import fx

from thesean.passes.analyse.dataflow import DataFlow, valued_inputs
from thesean.passes.analyse.regions import VIEWS, is_linear_map
from thesean.passes.analyse.scores import operands_of
from thesean.passes.analyse.softmaxes import SOFTMAX

aten = torch.ops.aten

_FUSED = aten.scaled_dot_product_attention.default

# Linear in all that flows into them...
_SUMS = {
    *VIEWS, getitem, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.neg.default, aten.to.dtype,
    aten._to_copy.default, aten.type_as.default, aten.unbind.int, aten.stack.default, aten.repeat.default,
    aten.repeat_interleave.self_int, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dims, aten.mT.default,
    aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default, aten.narrow.default,
    aten.expand_as.default, aten.view_as.default, aten.flip.default, aten.roll.default, aten.index_select.default,
    aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default, aten.view_as_complex.default,
    aten.view_as_real.default,
}  # fmt: skip
# ...and in one of what they multiply, where the other doesn't hang on a hidden state.
_PRODUCTS = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.linear.default, aten.matmul.default,
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.einsum.default,
}  # fmt: skip


class Front(NamedTuple):
    """What the attention of `operator` is made of by linear maps, (B, T, width) each, in the graph's order, and the
    nodes that lie between, up to query, key and value.
    """

    operator: fx.Node
    sources: tuple[fx.Node, ...]
    between: frozenset[fx.Node]


def find_fronts(flow: DataFlow) -> list[Front]:
    """One for each attention that reads a latent beside something else."""
    found = (_front(flow, node) for node in flow.order if node.target is _FUSED or node.target in SOFTMAX)
    return [front for front in found if front is not None]


def _front(flow: DataFlow, operator: fx.Node) -> Front | None:
    operands = operands_of(operator, flow.dag) if operator in flow.dag else None
    if operands is None:
        return None
    linear, ends = _linear(flow, operands)
    inside = linear - _above(flow, ends)
    sources = _sources(flow, inside)
    sizes = [_steps(node) for node in sources]
    if len(sources) < 2 or None in sizes or len(set(sizes)) > 1 or _meet_in_one(flow, inside, sources, operands):
        return None
    others = set(sources)
    latents = [s for s in sources if not others.isdisjoint(_above(flow, [s]) - {s}) or _made_of(flow, s, others)]
    if not any(_is_mapped(source, inside) for source in latents):
        return None  # norms of queries and keys themselves
    return Front(operator, tuple(sorted(sources, key=flow.order.__getitem__)), frozenset(inside))


def _linear(flow: DataFlow, operands: Iterable[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """(nodes on the way up that are linear in what flows into them, the first ones that are not)."""
    linear: set[fx.Node] = set()
    ends: set[fx.Node] = set()
    front = list(operands)
    for node in front:  # it grows
        if node in linear or node in ends:
            continue
        read = _read(flow, node)
        maps = node.target in _PRODUCTS and len(read) == 1 and not _divides(node, read)
        if read and (maps or node.target in _SUMS):
            linear.add(node)
            front += read
        else:
            ends.add(node)
    return linear, ends


def _read(flow: DataFlow, node: fx.Node) -> list[fx.Node]:
    return [above for above in dict.fromkeys(valued_inputs(node)) if above in flow.dag]


def _divides(node: fx.Node, read: list[fx.Node]) -> bool:
    """By what flows in."""
    return node.target is aten.div.Tensor and node.args[1] is read[0]


def _above(flow: DataFlow, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These, and all that flows into them."""
    found = set(nodes)
    front = list(found)
    while front:
        more = [n for n in _read(flow, front.pop()) if n not in found]
        found.update(more)
        front += more
    return found


def _sources(flow: DataFlow, inside: set[fx.Node]) -> list[fx.Node]:
    """What flows into `inside`, each as far down as it is read by one node alone that maps nothing and adds nothing:
    these leave `inside`.
    """
    found: dict[fx.Node, None] = {}
    front = [above for node in inside for above in _read(flow, node) if above not in inside]
    for node in front:  # it grows
        users = [user for user in node.users if user in inside]
        if not isinstance(node.meta.get("val"), torch.Tensor) or (len(users) == 1 and _narrows(flow, node, users[0])):
            inside.difference_update(users)
            front += users
        elif users:
            found[node] = None
    return [node for node in found if node not in inside]


def _narrows(flow: DataFlow, node: fx.Node, user: fx.Node) -> bool:
    alone = not is_linear_map(user) and _read(flow, user) == [node]
    return alone and _steps(user) is not None and _steps(user) == _steps(node) and _width(user) <= _width(node)


def _steps(node: fx.Node) -> tuple[str, ...] | None:
    """B and T of (B, T, width), a width that is a number."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim != 3 or not isinstance(value.shape[2], int):
        return None
    return tuple(map(str, value.shape[:2]))


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[2])


def _meet_in_one(flow: DataFlow, inside: set[fx.Node], sources: list[fx.Node], operands: Iterable[fx.Node]) -> bool:
    """Whether one value lies on all ways from the sources to the heads: that is what the attention reads."""
    ways: nx.DiGraph = nx.DiGraph()
    ways.add_edges_from((node, above) for node in inside for above in _read(flow, node))
    ways.add_edges_from(("heads", operand) for operand in operands)
    ways.add_edges_from((source, "sources") for source in sources)
    return bool(nx.immediate_dominators(ways, "heads")["sources"] != "heads")


def _made_of(flow: DataFlow, source: fx.Node, others: set[fx.Node]) -> bool:
    """Whether a source comes of what another one was cut out of."""
    cut = [above for other in others - {source} for above in _read(flow, other)]
    return not _above(flow, [source]).isdisjoint(cut)


def _is_mapped(source: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a matrix lies between a source and the heads."""
    front = [source]
    for node in front:  # it grows
        below = [user for user in node.users if user in inside and user not in front]
        if any(map(is_linear_map, below)):
            return True
        front += below
    return False
