"""Give each sum over all steps so far what it has come to as state, and each product, largest or least value.

B batch, T time
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.analyse.positions import counters, running_sums
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.clock import NO_TIME, has_one_time
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.running import run_instead, values_of
from thesean.passes.graph.running_fold import FOLDS, RunningFold, fold_of
from thesean.passes.graph.running_sum import RunningSum
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import beside, erase_dead, free_names
from thesean.passes.graph.two_sizes import TwoSizes

aten = torch.ops.aten


@dataclass(frozen=True)
class CarrySums(Pass):
    """cumsum(x) along time  =>  sums, last = running(x), for hidden states and floats.

    `running` is a module that carries a state, for ThreadState to thread: the last sum, zeros at the start. Linear
    attention that is written as sums of products streams by it, and means and norms of all steps so far; by cumprod,
    logcumsumexp, cummax and cummin gated recurrences that are written as scans. What counts visible steps and positions
    stays: ThreadState knows them. The new graph shares its parameters with the incoming one, which stays as it was.
    """

    in_place = False

    signature: Signature

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not has_one_time(self.signature):
            return PassResult.unchanged(graph_module, NO_TIME)
        none = PassResult.unchanged(graph_module, "nothing is summed up over time")
        if not any(n.target in (aten.cumsum.default, *FOLDS) for n in graph_module.graph.nodes):
            return none
        new = beside(graph_module)
        graph = new.graph
        with evaluating(new):
            two = TwoSizes(new, self.signature)
        signals = {s.name for s in self.signature.inputs if s.dtype.is_floating_point and not s.mask}
        counts = {n for n, mask in running_sums(new) if str(mask.target) not in signals}
        counts |= {c.node for c in counters(new)}
        sums, folds = free_names(new, "sum"), free_names(new, "fold")
        found = 0
        for node in list(graph.nodes):
            fold = fold_of(node)
            if (fold is None and node.target is not aten.cumsum.default) or node in counts:
                continue
            made = next(iter(values_of(node)), None)
            dim = two.time_dim(made)
            if made is None or dim is None or argument(node, 1, "dim") % two.rank(made) != dim:
                continue
            if fold is None:
                run_instead(new, node, RunningSum(dim), next(sums))
            else:
                run_instead(new, node, RunningFold(dim, fold), next(folds))
            found += 1
        if not found:
            return none
        erase_dead(graph)
        new.recompile()
        new.train(graph_module.training)
        return PassResult(graph_module=new, modified=True)
