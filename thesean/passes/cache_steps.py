"""Give each causal convolution that is left, and each shift, the steps that it looks back at as state.

B batch, T time
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.chunks import LOOKS_BACK, RELATES
from thesean.passes.analyse.earlier_steps import CANDIDATES, FrontPadded, PaddedConvolution, earlier_steps
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.clock import NO_TIME, has_one_time
from thesean.passes.graph.last_steps import LastSteps
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.stream import looks_ahead
from thesean.passes.graph.surgery import beside, end_of_call, erase_dead, free_names
from thesean.passes.graph.two_sizes import TwoSizes

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheSteps(Pass):
    """[0, ..., 0, x]  =>  whole, last = steps(x), and conv(x, padding=p)[..., :T]  =>  conv(whole), along time.

    `steps` is a module that carries a state, for ThreadState to thread: the last p steps of what came before, zeros at
    the start. It stands for the zeros that are put in front of a sequence by a pad, by a cat or by writing behind them
    (token shifts), whatever reads them: a convolution of any rank, a pool, a window. Where a part looks ahead, or with
    `ahead`, it stands for zeros behind the sequence as well, and looks ahead itself, for DelaySteps to delay what it
    meets. The new graph shares its parameters with the incoming one, which stays as it was.
    """

    in_place = False

    signature: Signature
    ahead: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not has_one_time(self.signature):
            return PassResult.unchanged(graph_module, NO_TIME)
        none = PassResult.unchanged(graph_module, "nothing puts zeros in front of a sequence")
        if CANDIDATES.isdisjoint(n.target for n in graph_module.graph.nodes):
            return none
        new = beside(graph_module)
        graph = new.graph
        with evaluating(new):
            two = TwoSizes(new, self.signature)
        found = earlier_steps(graph, two, self.ahead or looks_ahead(graph_module))
        if not found:
            return none
        rewriting = _Rewriting(new)
        free = free_names(graph_module, "steps")
        named = list(zip(free, found, strict=False))
        for name, each in reversed(named):  # what one is made of may be another, and is read by nothing then
            if not each.node.users:
                continue
            if isinstance(each, FrontPadded):
                rewriting.pad(each, name, two)
            else:
                rewriting.convolve(each, name)
        erase_dead(graph)
        new.recompile()
        new.train(graph_module.training)
        return PassResult(graph_module=new, modified=True)


class _Rewriting:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module, self.graph = graph_module, graph_module.graph
        self.made: dict[tuple[fx.Node, int, int, int], fx.Node] = {}  # those that look as far back at the same share it

    def _before(self, source: fx.Node, found: FrontPadded | PaddedConvolution, name: str) -> fx.Node:
        """What stands for a sequence with zeros in front of it."""
        key = source, found.count, found.dim, found.ahead
        if key not in self.made:
            self.graph_module.add_submodule(name, LastSteps(found.count, found.dim, found.ahead))
            with self.graph.inserting_after(end_of_call(source)):
                call = self.graph.call_module(name, (source,))
            with self.graph.inserting_after(call):
                whole = self.graph.call_function(getitem, (call, 0))
            stack = found.node.meta.get("nn_module_stack", {})
            call.meta["nn_module_stack"] = stack
            whole.meta = {RELATES: True, "nn_module_stack": stack}
            self.made[key] = whole
        return self.made[key]

    def pad(self, found: FrontPadded, name: str, two: TwoSizes) -> None:
        node, source = found.node, found.source
        if any(found.others):
            with self.graph.inserting_before(node):
                source = self.graph.call_function(aten.pad.default, (source, list(found.others)))
        padded = self._before(source, found, name)
        if found.cut:
            with self.graph.inserting_before(node):
                padded = self.graph.call_function(aten.slice.Tensor, (padded, found.dim, 0, -found.cut))
        _mark(node, two)
        padded.meta.update({k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", *_MARKS)})
        node.replace_all_uses_with(padded)
        erase_dead(self.graph)

    def convolve(self, found: PaddedConvolution, name: str) -> None:
        node, axes = found.node, len(found.padding)
        given = (argument(node, 1, "weight"), argument(node, 2, "bias"), argument(node, 3, "stride", [1] * axes))
        beyond = (argument(node, 5, "dilation", [1] * axes), argument(node, 6, "groups", 1))
        node.args = (self._before(found.source, found, name), *given, list(found.padding), *beyond)
        node.kwargs = {}
        node.target = _BY_NUMBER.get(node.target, node.target)
        node.meta[LOOKS_BACK] = True
        for trim in found.trims:
            short = trim.args[0]
            assert isinstance(short, fx.Node)
            trim.replace_all_uses_with(short)
            while short is not node:  # all between is as long as the sequence now
                short.meta.pop("val", None)
                short = short.all_input_nodes[0]
        if found.trims:
            node.meta.pop("val", None)


_MARKS = (RELATES, LOOKS_BACK)
# a convolution whose padding is a word, and the one whose is a number
_BY_NUMBER: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}  # fmt: skip


def _mark(node: fx.Node, two: TwoSizes) -> None:
    """All from a node on that is longer than the sequence, and what makes it as long again."""
    front = [node]
    while front:
        now = front.pop()
        if now.name not in two.shapes or RELATES in now.meta:
            continue
        if two.time_dim(now) is not None:
            now.meta[LOOKS_BACK] = True
            continue
        now.meta[RELATES] = True
        front.extend(now.users)
