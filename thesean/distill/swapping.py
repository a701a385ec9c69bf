"""The guide with some of a hybrid's parts in it, others at each call: what a stochastic stage trains.

BERT-of-Theseus (Xu et al. 2020, arXiv 2002.02925): r_k ~ Bernoulli(p) decides for each part and batch whether the
replacement stands in the network or the guide's own, p = min(1, k t + b) rises with the steps, and only replacements
are trained. With p = 1 what is trained is the converted network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from thesean.distill.recompute import Recomputed, Recomputing
from thesean.passes.graph.walk import Inputs, value_of
from thesean.passes.plan.hybrid import Hybrid


def probability(step: int, steps: int, begin: float, all_at: float) -> float:
    """That a part is swapped in at `step` of 0..steps-1: rises from `begin` to 1 over the share `all_at` of them."""
    return begin + (1 - begin) * min(1.0, step / max(1.0, all_at * steps))


class _Run(NamedTuple):
    """What is computed, in order; for each node whom else it stands for, and what nothing reads any more after it. All
    `regions` but the first and the last are computed anew in the backward.
    """

    nodes: list[fx.Node]
    others: list[list[fx.Node]]
    dead: list[list[fx.Node]]
    regions: list[range]
    output: fx.Node


class Swapping:
    """`output(parts, inputs)`: the guide's graph in which these parts are the hybrid's.

    Masks that replacements read, casts and what else stands between a part's ends are the hybrid's nodes. Nothing here
    asks for gradients of the guide, nor keeps them from it: see `frozen`.
    """

    def __init__(self, guide: fx.GraphModule, hybrid: Hybrid, recomputing: Recomputing) -> None:
        self.guide, self.hybrid, self.recomputing = guide, hybrid, recomputing
        self._cuts: set[str] | None = None  # names of nodes of the guide, or of the hybrid alone
        self._theirs = {n.name: n for n in guide.graph.nodes}
        self._exits = {r.exit: r.guide_exit for r in hybrid.replacements}
        trained = {r.part for r in hybrid.replacements if hybrid.has_weights(r)}
        self.free = sorted(trained)  # what is only dropped is dropped at each step
        self._always = {r.part for r in hybrid.replacements} - trained
        self._runs: dict[frozenset[int], _Run] = {}

    def drawn(self, chance: float) -> frozenset[int]:
        """Parts, each with this probability, of torch's generator; one at least, or a step would train nothing."""
        draws = torch.rand(len(self.free)).tolist()
        found = [k for k, draw in zip(self.free, draws, strict=True) if draw < chance]
        return frozenset(found or [self.free[int(torch.randint(len(self.free), ()))]])

    def output(self, parts: frozenset[int], inputs: Inputs) -> Any:
        if self._cuts is None:
            self._cuts = self._found(inputs)
        if parts not in self._runs:
            self._runs[parts] = self._run(parts | self._always, self._cuts)
        run = self._runs[parts]
        env: dict[fx.Node, Any] = {}
        for number, region in enumerate(run.regions):
            anew = 0 < number < len(run.regions) - 1
            env = (self._through_anew if anew else self._through)(run, region, env, inputs)
        return fx.map_arg(run.output.args[0], env.__getitem__)

    def _found(self, inputs: Inputs) -> set[str]:
        if not self.recomputing.wanted:
            return set()
        cuts = self.recomputing.cuts(self.hybrid.graph_module, inputs)
        return {self._exits.get(name, name) for name in cuts.after}

    def _through(self, run: _Run, region: range, env: dict[fx.Node, Any], inputs: Inputs) -> dict[fx.Node, Any]:
        """The values in hand after a region, of those before it."""
        env = dict(env)
        for at in region:
            node = run.nodes[at]
            value = value_of(self._home(node), node, env, inputs)
            env.update(dict.fromkeys((node, *run.others[at]), value))
            for gone in run.dead[at]:
                env.pop(gone, None)
        return env

    def _through_anew(self, run: _Run, region: range, env: dict[fx.Node, Any], inputs: Inputs) -> dict[fx.Node, Any]:
        after: list[fx.Node] = []

        def through(*values: Any) -> tuple[Any, ...]:
            found = self._through(run, region, dict(zip(env, values, strict=True)), inputs)
            after[:] = found
            return tuple(found.values())

        calls = [n for n in run.nodes[region.start : region.stop] if n.op == "call_module"]
        modules = [self._home(n).get_submodule(str(n.target)) for n in calls]
        values = Recomputed(through, modules)(*env.values())
        return dict(zip(after, values, strict=True))

    def _home(self, node: fx.Node) -> fx.GraphModule:
        return self.guide if self._theirs.get(node.name) is node else self.hybrid.graph_module

    def _run(self, parts: frozenset[int], cuts: set[str]) -> _Run:
        own = {n.name: n for n in self.hybrid.graph_module.graph.nodes}
        swapped = {r.guide_exit: own[r.exit] for r in self.hybrid.replacements if r.part in parts}

        def stand_in(node: fx.Node) -> fx.Node:
            """What is computed where a node of either graph is read."""
            name = self._exits.get(node.name, node.name)
            return swapped.get(name) or self._theirs.get(name, node)

        end = self.guide.graph.output_node()
        order: dict[fx.Node, None] = {}
        waiting = list(reversed(end.all_input_nodes))
        while waiting:  # depth first, each node after all that it reads
            node = stand_in(waiting[-1])
            missing = [i for i in node.all_input_nodes if stand_in(i) not in order]
            if missing:
                waiting += reversed(missing)
            else:
                order.setdefault(node)
                waiting.pop()
        nodes = list(order)
        others: dict[fx.Node, dict[fx.Node, None]] = {n: {} for n in nodes}
        last: dict[fx.Node, int] = {}
        for at, node in enumerate(nodes):
            for read in (*node.all_input_nodes, node):
                last[read] = at
                others[stand_in(read)].setdefault(read)
        for read in end.all_input_nodes:
            last.pop(read, None)
            others[stand_in(read)].setdefault(read)
        dead: list[list[fx.Node]] = [[] for _ in nodes]
        for read, at in last.items():
            dead[at].append(read)
        ends = [at + 1 for at, n in enumerate(nodes) if self._exits.get(n.name, n.name) in cuts]
        regions = [range(a, b) for a, b in pairwise([0, *ends, len(nodes)])]
        return _Run(nodes, [list(o) for o in others.values()], dead, regions, end)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
