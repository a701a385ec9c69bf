"""Does each step of a graph's values come from that step alone? Proved node by node, where an operator's rule is known.

Numbers can't tell: whether any step of a sequence is above some bound may be so in none that was tried.

B batch, T time, D width
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.chunks import LOOKS_BACK, RELATES
from thesean.passes.analyse.dataflow import SIZE_ONLY
from thesean.passes.graph.nodes import argument

aten = torch.ops.aten

# What only moves, repeats or regroups numbers: steps stay apart as long as no dimension of theirs is named.
_MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default,
    aten.stack.default, aten.expand_as.default, aten.view_as.default, aten.numpy_T.default, aten.mT.default,
}  # fmt: skip

# table, indices: where the table holds steps, its rows are others'
_TABLES = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default}
_PRODUCTS = {
    aten.matmul.default: (0, 1), aten.bmm.default: (0, 1), aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2),
}  # fmt: skip
_NORMS = {aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default}
_ENDS = (None, 0)
_WHOLE = 2**62  # a slice's end, where it says none

# Names by which operators call the dimensions that they work along.
_DIMS = ("dim", "dims", "dim0", "dim1", "dimension", "axis")

_COMPARE = {
    aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.remainder, aten.fmod,
    aten.floor_divide, aten.ge, aten.gt, aten.le, aten.lt, aten.eq, aten.ne,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """The first node of which a step is known to need other steps."""

    node: fx.Node
    what: str


def first_mixed(graph: fx.Graph, long: Mapping[fx.Node, Any], short: Mapping[fx.Node, Any]) -> Mixed | None:
    """None where no operator is known to mix steps; `long` and `short` are every node's values in two runs of one
    batch, that differ in length. Modules, and operators without a rule, are not looked into.

    A step's last one may be read by itself, as where a sequence is summed up; not beside the others.
    """
    steps = _Steps(long, short)
    for node in graph.nodes:
        if what := steps.meet(node):
            return Mixed(node=node, what=what)
    return None


class _Steps:
    """Which dimensions of a node are time, and what is known to be made of the last step."""

    def __init__(self, long: Mapping[fx.Node, Any], short: Mapping[fx.Node, Any]) -> None:
        self.long, self.short = long, short
        self.entered: set[fx.Node] = set()
        self.last: set[fx.Node] = set()

    def times(self, node: Any) -> tuple[int, ...]:
        """The dimensions of a tensor that inputs' values enter in which it grows with the sequence."""
        if node not in self.entered:
            return ()
        a, b = self.long.get(node), self.short.get(node)
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.ndim != b.ndim:
            return ()
        return tuple(d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n)

    def meet(self, node: fx.Node) -> str | None:
        """How this node mixes steps, None where it isn't known to."""
        if node.op == "placeholder":
            self.entered.add(node)
            return None
        carries = isinstance(self.long.get(node), (torch.Tensor, tuple, list))
        if not carries or self.entered.isdisjoint(node.all_input_nodes):
            return None
        self.entered.add(node)
        if node.op != "call_function" or RELATES in node.meta or node.target in SIZE_ONLY:
            return None
        given = [i for i in node.all_input_nodes if i in self.entered]
        with_steps = [i for i in given if self.times(i)]
        if any(i in self.last for i in given):
            if with_steps:
                return "the last step meets the others"
            self.last.add(node)
        if not with_steps or not isinstance(node.target, torch._ops.OpOverload):
            return None
        if self._is_last(node):
            self.last.add(node)
            return None
        return None if LOOKS_BACK in node.meta else self._mixes(node, with_steps[0])

    def _is_last(self, node: fx.Node) -> bool:
        """x[:, -1] and x[:, -1:]."""
        source = node.args[0]
        along = self._named(node)
        if not (isinstance(source, fx.Node) and along and set(along) <= set(self.times(source))):
            return False
        if node.target is aten.select.int:
            return bool(argument(node, 2, "index") == -1)
        if node.target is aten.slice.Tensor:
            return bool(argument(node, 2, "start") == -1 and self._open(argument(node, 3, "end"), source, along[0]))
        return False

    def _mixes(self, node: fx.Node, first: fx.Node) -> str | None:
        target: Any = node.target
        if torch.Tag.pointwise in target.tags:
            return "it reads how long the sequence is" if self._reads_length(node) else None
        if target in _PRODUCTS:
            return self._contracts(*(node.args[at] for at in _PRODUCTS[target]))
        if target in _TABLES:
            return self._looks_up(node)
        if target in _NORMS:
            rank, over = self.long[first].ndim, len(argument(node, 1, "normalized_shape"))
            return "it is normalised over time" if any(d >= rank - over for d in self.times(first)) else None
        if target in (aten.pad.default, aten.constant_pad_nd.default):
            return self._pads(node, first)
        if target is aten.linear.default:
            return "it weighs steps" if self.long[first].ndim - 1 in self.times(first) else None
        along = [d for d in self._named(node) if d in self.times(first)]
        if target is aten.slice.Tensor:
            return None if not along or self._is_whole(node, first, along[0]) else "it cuts the sequence"
        if along and target not in _MOVES:
            return "it works along time"
        if not along and target not in _MOVES and self._forgets(node, first):
            return "it sums up the steps"
        return None

    def _named(self, node: fx.Node) -> tuple[int, ...]:
        """The dimensions of its first tensor that a node names, from the front."""
        target: Any = node.target
        found: list[int] = []
        rank = next((v.ndim for i in node.all_input_nodes if isinstance(v := self.long.get(i), torch.Tensor)), 0)
        for position, schema in enumerate(target._schema.arguments):
            if schema.name not in _DIMS:
                continue
            value = argument(node, position, schema.name, schema.default_value)
            found += [
                d % max(rank, 1) for d in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(d, int)
            ]
        return tuple(found)

    def _forgets(self, node: fx.Node, first: fx.Node) -> bool:
        """No dimension is named, and the steps are gone: sum(x), any(x)."""
        return isinstance(self.long[node], torch.Tensor) and not self.times(node) and bool(self.times(first))

    def _reads_length(self, node: fx.Node) -> bool:
        """A number that is another one for another length, beside steps: x * T, but not what fills a shape."""
        sizes = [i for i in node.all_input_nodes if isinstance(self.long.get(i), (int, float))]
        return any(self.long[i] != self.short[i] for i in sizes)

    def _contracts(self, a: Any, b: Any) -> str | None:
        x, y = self.long[a], self.long[b]
        summed = {a: x.ndim - 1, b: max(y.ndim - 2, 0)}
        if any(summed[n] in self.times(n) for n in (a, b)):
            return "it sums over steps"
        outer = [d - x.ndim for d in self.times(a)], [d - y.ndim for d in self.times(b)]
        return "it relates steps with each other" if -2 in outer[0] and -1 in outer[1] else None

    def _looks_up(self, node: fx.Node) -> str | None:
        steps = self.times(node.args[0])
        if node.target is aten.index.Tensor:
            indexed = [d for d, index in enumerate(argument(node, 1, "indices")) if index is not None]
        elif node.target is aten.embedding.default:
            indexed = [0]
        else:
            indexed = list(self._named(node)) or list(steps)
        return "it picks steps" if set(indexed) & set(steps) else None

    def _pads(self, node: fx.Node, first: fx.Node) -> str | None:
        amounts, rank = list(argument(node, 1, "pad")), self.long[first].ndim
        padded = {rank - 1 - at // 2 for at, amount in enumerate(amounts) if amount != 0}
        return "it moves steps" if padded & set(self.times(first)) else None

    def _is_whole(self, node: fx.Node, source: fx.Node, dim: int) -> bool:
        start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
        return start in _ENDS and step == 1 and self._open(argument(node, 3, "end"), source, dim)

    def _open(self, end: Any, source: fx.Node, dim: int) -> bool:
        """Whether a slice that ends there goes to the end whatever the length: no number, or the length itself."""
        if isinstance(end, fx.Node):
            is_size = end.target is aten.sym_size.int
            return is_size and all(v[end] == v[source].shape[dim] for v in (self.long, self.short))
        return end is None or (isinstance(end, int) and end > _WHOLE)


def constants_of_time(
    graph: fx.Graph, long: Mapping[fx.Node, Any], short: Mapping[fx.Node, Any], states: Container[str]
) -> tuple[int, ...]:
    """Whole numbers that a graph compares positions with, or lengths and counts: past each it may go another way.

    Positions are what sizes and `states`, inputs by name, decide alone, and running sums of anything.
    """
    held: set[fx.Node] = set()  # what the caller's values enter, beside counts of them
    found: set[int] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target) not in states:
            held.add(node)
        counts = node.target is aten.cumsum.default or _is_number(long.get(node))  # sizes carry no values
        if not counts and not held.isdisjoint(node.all_input_nodes):
            held.add(node)
        elif getattr(node.target, "overloadpacket", None) in _COMPARE and any(
            _grows(long.get(i), short.get(i)) for i in node.all_input_nodes
        ):
            found.update(math.ceil(abs(n)) for n in (*node.args, *node.kwargs.values()) if _is_number(n))
    return tuple(sorted(n for n in found if n < _WHOLE))


def _grows(a: Any, b: Any) -> bool:
    """A size that does, or a tensor."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape != b.shape
    return _is_number(a) and a != b


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
