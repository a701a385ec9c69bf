"""Find where a graph puts zeros around a sequence so that what follows reads earlier steps: causal convolutions, shifts
by a step, causal pools and windows; and later ones, where zeros stand behind it too.

Where that may stand is found in the graph. What stands there is not matched against known spellings: it is held against
the sequence that it may be made of, in two runs of other sizes.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from thesean.passes.graph.nodes import argument
from thesean.passes.graph.two_sizes import TwoSizes

aten = torch.ops.aten

# operator -> how many dimensions a kernel has; input, weight, bias, stride, padding, dilation and groups stand alike
CONVOLUTIONS = {
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
    aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3,
}  # fmt: skip

_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_JOINS = {
    *_PADS, aten.cat.default, aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default,
    aten.copy.default,
}  # fmt: skip
CANDIDATES = {*CONVOLUTIONS, *_JOINS}

# What moves a dimension and leaves its numbers in their order
_MOVES = {
    aten.transpose.int, aten.permute.default, aten.mT.default, aten.swapaxes.default, aten.movedim.int,
    aten.movedim.intlist, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default, aten.contiguous.default,
}  # fmt: skip

# Nodes between a sequence and what has zeros in front of it: a write into a view of zeros is some five of them
_FARTHEST = 8


@dataclass(frozen=True, kw_only=True)
class FrontPadded:
    """`node` is `source` behind `count` zeros along `dim`, without its last `cut` steps or with `ahead` zeros behind
    it; `others` pads the other dimensions, as torch's pad has it.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    count: int
    cut: int = 0
    ahead: int = 0
    others: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PaddedConvolution:
    """`node` is a convolution of `source`, padded at both ends of `dim` by `count`, and in its other dimensions as
    `padding` says; `trims` take from what it gives all that the zeros at the end came to, and nothing else. Without one
    it gives as many steps as it reads, and looks `ahead` as far as it looks back.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    count: int
    padding: tuple[int, ...]
    ahead: int = 0
    trims: tuple[fx.Node, ...] = ()


Found = FrontPadded | PaddedConvolution


def earlier_steps(graph: fx.Graph, two: TwoSizes, ahead: bool = False) -> list[Found]:
    """In the order of the graph that ran at `two` sizes. Those that look ahead too where `ahead` is True."""
    finder = _Finder(two, ahead)
    return [found for node in graph.nodes if (found := finder.find(node)) is not None]


class _Finder:
    def __init__(self, two: TwoSizes, ahead: bool) -> None:
        self.two, self.runs, self.shapes, self.ahead = two, two.runs, two.shapes, ahead

    def find(self, node: fx.Node) -> Found | None:
        if node.target in CONVOLUTIONS:
            return self._convolved(node)
        if node.target in _PADS and (found := self._padded(node)) is not None:
            return found
        return self._shifted(node) if node.target in _JOINS else None

    # zeros in front

    def _padded(self, node: fx.Node) -> FrontPadded | None:
        """A pad of several dimensions, of which one is time, or of time at both ends."""
        source, dim = node.args[0], self.two.time_dim(node.args[0])
        if not isinstance(source, fx.Node) or dim is None or (amounts := _zeros_added(node)) is None:
            return None
        first = 2 * (self.two.rank(source) - 1 - dim)
        others = (*amounts[:first], 0, 0, *amounts[first + 2 :])
        front, end = amounts[first : first + 2] if first < len(amounts) else (0, 0)
        later = end if self.ahead else 0
        if front < 0 or front + later <= 0 or end > later or not (any(others) or later):
            return None
        return FrontPadded(node=node, source=source, dim=dim, count=front, cut=max(-end, 0), ahead=later, others=others)

    def _shifted(self, node: fx.Node) -> FrontPadded | None:
        """One that is nothing but zeros and then a sequence that it is made of."""
        for source in self._made_of(node):
            dim = self.two.time_dim(source)
            if dim is None or self.two.rank(source) != self.two.rank(node):
                continue
            tried = [set(_shifts(run[node], run[source], dim)) for run in self.runs]
            for count, cut in sorted(set.intersection(*tried)):
                return FrontPadded(node=node, source=source, dim=dim, count=count, cut=cut)
        return None

    def _made_of(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a node is computed from, nearest first."""
        front, seen = [node], {node}
        for _ in range(_FARTHEST):
            front = list(dict.fromkeys(i for n in front for i in n.all_input_nodes if i not in seen))
            seen.update(front)
            yield from front

    # zeros at both ends of what a convolution reads

    def _convolved(self, node: fx.Node) -> PaddedConvolution | None:
        """conv(x, padding=count)[..., :-count], or conv(x, padding=count)"""
        source, axes = node.args[0], CONVOLUTIONS[cast(Any, node.target)]
        strides, padding = _of_all(argument(node, 3, "stride", 1), axes), argument(node, 4, "padding", 0)
        if not isinstance(source, fx.Node):
            return None
        if padding == "same":
            return self._as_long_as_it_reads(node, source, axes)
        padding = _of_all(0 if padding == "valid" else padding, axes)
        dim = self.two.time_dim(source)
        if dim is None and source.target in _PADS:
            return self._padded_before(node, source, strides, padding)
        if dim is None or dim < 2 or self.two.rank(source) != axes + 2:
            return None
        count, left = padding[dim - 2], (*padding[: dim - 2], 0, *padding[dim - 1 :])
        if strides[dim - 2] != 1:
            return None
        if self.ahead and count > 0 and self.two.time_dim(node) == dim:
            return PaddedConvolution(node=node, source=source, dim=dim, count=count, padding=left, ahead=count)
        return self._cut_back(node, source, dim, count, left)

    def _as_long_as_it_reads(self, node: fx.Node, source: fx.Node, axes: int) -> PaddedConvolution | None:
        """conv(x, padding="same"): where the zeros can't be halved there is one more at the end."""
        dim, weight = self.two.time_dim(source), self.shapes[node.all_input_nodes[1].name][0]
        dilation = _of_all(argument(node, 5, "dilation", 1), axes)
        zeros = [d * (size - 1) for d, size in zip(dilation, weight[2:], strict=True)]
        if not self.ahead or dim is None or dim < 2 or any(z % 2 for d, z in enumerate(zeros) if d != dim - 2):
            return None
        here = zeros[dim - 2]
        padding = tuple(0 if d == dim - 2 else z // 2 for d, z in enumerate(zeros))
        if not here:
            return None
        return PaddedConvolution(
            node=node, source=source, dim=dim, count=here // 2, padding=padding, ahead=here - here // 2
        )

    def _padded_before(
        self, node: fx.Node, padded: fx.Node, strides: tuple[int, ...], padding: tuple[int, ...]
    ) -> PaddedConvolution | None:
        """conv(F.pad(x, (count, count)))[..., :-count]"""
        source, amounts = padded.args[0], _zeros_added(padded)
        dim = self.two.time_dim(source)
        if not isinstance(source, fx.Node) or dim is None or dim < 2 or amounts is None:
            return None
        first = 2 * (self.two.rank(source) - 1 - dim)
        here = amounts[first : first + 2]
        alone = sum(map(abs, amounts)) == sum(here) and len(set(here)) == 1
        if not alone or self.two.rank(source) != len(padding) + 2 or (strides[dim - 2], padding[dim - 2]) != (1, 0):
            return None
        return self._cut_back(node, source, dim, here[0], padding)

    def _cut_back(
        self, node: fx.Node, source: fx.Node, dim: int, count: int, padding: tuple[int, ...]
    ) -> PaddedConvolution | None:
        if count <= 0 or self.two.time_dim(node, count) != dim:
            return None
        readers = list(self._trims(node, count))
        trims = tuple(r for r in readers if r is not None)
        if not trims or len(trims) < len(readers):
            return None
        return PaddedConvolution(node=node, source=source, dim=dim, count=count, padding=padding, trims=trims)

    def _trims(self, node: fx.Node, count: int) -> Iterator[fx.Node | None]:
        """What cuts a node back to the sequence's length, behind what works on each number alone; None for all else
        that reads it.
        """
        dim = self.two.time_dim(node, count)
        for user in node.users:
            if user.target in (aten.slice.Tensor, aten.narrow.default):
                along = cast(int, argument(user, 1, "dim", 0)) % self.two.rank(node)
                whole = argument(user, 2, "start") in (0, None) and argument(user, 4, "step", 1) == 1
                yield user if along == dim and whole and self.two.time_dim(user) == dim else None
            elif self._keeps_order(user, node) and self.two.time_dim(user, count) is not None:
                yield from self._trims(user, count)
            else:
                yield None

    def _keeps_order(self, user: fx.Node, node: fx.Node) -> bool:
        if user.op != "call_function" or user.all_input_nodes != [node]:
            return False
        pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ())
        return user.target in _MOVES or (pointwise and self.shapes.get(user.name) == self.shapes[node.name])


def _of_all(value: Any, axes: int) -> tuple[int, ...]:
    """A size that is written as one number, or as a list of one, for each axis."""
    sizes = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(sizes) if len(sizes) == axes else (sizes[0],) * axes


def _zeros_added(node: fx.Node) -> tuple[int, ...] | None:
    """How many zeros a pad adds, the last dimension first; None where it adds others, or an unknown number."""
    amounts = argument(node, 1, "pad")
    constant = node.target is aten.constant_pad_nd.default
    value = argument(node, 2, "value", 0) if constant else argument(node, 3, "value")
    known = value in (0, None) and (constant or argument(node, 2, "mode", "constant") == "constant")
    return tuple(amounts) if known and all(isinstance(n, int) for n in amounts) else None


def _shifts(value: torch.Tensor, source: Any, dim: int) -> Iterator[tuple[int, int]]:
    """(count, cut) such that a value is `source` behind so many zeros, without so many of its last steps."""
    if not isinstance(source, torch.Tensor) or source.dtype != value.dtype:
        return
    length, whole = value.shape[dim], source.shape[dim]
    for count in range(1, length):
        cut = whole - (length - count)
        if value.select(dim, count - 1).any():
            return  # the zeros have ended
        if cut >= 0 and torch.equal(value.narrow(dim, count, length - count), source.narrow(dim, 0, whole - cut)):
            yield count, cut
