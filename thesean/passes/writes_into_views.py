"""Writes into views, as in x[:, 1:] = y, become values: what shares the memory reads what was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import argument, is_write
from thesean.passes.graph.surgery import beside, erase_dead
from thesean.passes.graph.writes import MAYBE_VIEWS, is_view, twin_of, writes

aten = torch.ops.aten


@dataclass(frozen=True)
class WritesIntoViews(Pass):
    """v = slice(x); copy_(v, y); f(x)  =>  v' = copy(v, y); x' = slice_scatter(x, v'); f(x').

    Whatever is read later of the same memory is read off what it has become: x itself, v, and other views, which are
    taken anew. torch's own functionalisation does the same, takes other operators apart as well, and many times as
    long. A graph with a write that can't be followed (into a reshape, which may be a copy; into a buffer) stays as it
    was.
    """

    in_place = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not writes(graph_module):
            return PassResult.unchanged(graph_module, "no operator writes into its input")
        new = beside(graph_module)
        try:
            _Memory(new.graph).follow()
        except _NotFollowedError as error:
            return PassResult.unchanged(graph_module, str(error))
        erase_dead(new.graph)
        new.recompile()
        return PassResult(graph_module=new, modified=True)


class _NotFollowedError(Exception):
    """A write of which isn't known what it reaches, or how."""


@dataclass
class _Place:
    """Where a node's value lies: in the memory of `root`, by this `chain` of views, where it is `sure` that they are.
    `now` holds it as the memory was after so many `writes`.
    """

    root: fx.Node
    chain: tuple[fx.Node, ...]
    sure: bool
    writes: int
    now: fx.Node


@dataclass
class _Memory:
    graph: fx.Graph
    places: dict[fx.Node, _Place] = field(default_factory=dict)
    writes: dict[fx.Node, int] = field(default_factory=dict)  # into a root's memory so far

    def follow(self) -> None:
        """Raises _NotFollowedError, with the graph half done."""
        for node in list(self.graph.nodes):
            base = node.args[0] if node.args else None
            for read in node.all_input_nodes:
                if node.target is not aten.sym_size.int:
                    node.replace_input_with(read, self._current(read, node))
            if is_write(node):
                self._write(node, base)
            elif isinstance(base, fx.Node) and is_view(node) and not _converts(node, base):
                of = self.places[base]
                sure = of.sure and node.target not in MAYBE_VIEWS
                self.places[node] = _Place(of.root, (*of.chain, node), sure, self.writes.get(of.root, 0), node)
            else:
                self.places[node] = _Place(node, (), True, 0, node)

    def _current(self, read: fx.Node, reader: fx.Node) -> fx.Node:
        """What holds the value as it is by now, in front of whoever reads it."""
        place = self.places[read]
        if place.writes == self.writes.get(place.root, 0):
            return place.now
        if not place.sure:
            raise _NotFollowedError(f"{read.name} may share the memory that is written, and may be a copy")
        value = self.places[place.root].now
        with self.graph.inserting_before(reader):
            for view in place.chain:
                value = self._view_of(view, value)
        place.now, place.writes = value, self.writes[place.root]
        return value

    def _view_of(self, view: fx.Node, value: fx.Node) -> fx.Node:
        made = self.graph.create_node(view.op, view.target, (value, *view.args[1:]), view.kwargs)
        made.meta = dict(view.meta)
        return made

    def _write(self, node: fx.Node, base: Any) -> None:
        """The operator returns what it wrote, and what the views are views of takes it in."""
        place, twin = self.places.get(base), twin_of(node)
        if place is None or twin is None or not place.sure or place.root.op == "get_attr":
            raise _NotFollowedError(f"{node.name} writes where it can't be followed")
        holders = [self._current(each, node) for each in (place.root, *place.chain)]
        node.target = twin
        count = self.writes[place.root] = self.writes.get(place.root, 0) + 1
        value = node
        for view, of in zip(reversed((place.root, *place.chain)), (*reversed(holders[:-1]), None), strict=True):
            self.places[view].now, self.places[view].writes = value, count
            if of is not None:
                value = self._put_back(view, of, value, node)
        self.places[node] = _Place(place.root, place.chain, True, count, node)

    def _put_back(self, view: fx.Node, of: fx.Node, value: fx.Node, written: fx.Node) -> fx.Node:
        """`of` with `value` where `view` looks at it."""
        how = _inverse(view, of, value)
        if how is None:
            raise _NotFollowedError(f"{written.name} writes into {view.target}, which can't be put back")
        with self.graph.inserting_after(value):
            made = self.graph.call_function(*how)
        made.meta = {k: v for k, v in of.meta.items() if k == "val"}
        made.meta["nn_module_stack"] = written.meta.get("nn_module_stack", {})
        return made


def _converts(node: fx.Node, base: fx.Node) -> bool:
    """To another type, which makes a copy."""
    own, other = (getattr(n.meta.get("val"), "dtype", None) for n in (node, base))
    return node.target is aten.to.dtype and own is not None and own != other


def _inverse(view: fx.Node, of: fx.Node, value: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator and its arguments that put the value of a view into what it is a view of."""
    given: Any = view.args[1:]
    if view.target is aten.narrow.default and not all(isinstance(number, int) and number >= 0 for number in given[1:]):
        return None
    match view.target:
        case aten.select.int:
            return aten.select_scatter.default, (of, value, *given)
        case aten.slice.Tensor:
            ends = (argument(view, 2, "start", None), argument(view, 3, "end", None), argument(view, 4, "step", 1))
            return aten.slice_scatter.default, (of, value, argument(view, 1, "dim", 0), *ends)
        case aten.narrow.default:
            dim, start, length = given
            return aten.slice_scatter.default, (of, value, dim, start, start + length)
        case aten.t.default:
            return aten.t.default, (value,)
        case aten.transpose.int:
            return aten.transpose.int, (value, *given)
        case aten.permute.default:
            dims = [d % len(given[0]) for d in given[0]]
            return aten.permute.default, (value, [dims.index(d) for d in range(len(dims))])
        case aten.unsqueeze.default:
            return aten.squeeze.dim, (value, *given)
        case aten.alias.default | aten.detach.default:
            return aten.alias.default, (value,)
    return None
