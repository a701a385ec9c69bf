"""The guide with some of a hybrid's parts in it, others at each call: what a stochastic stage trains.

BERT-of-Theseus (Xu et al. 2020, arXiv 2002.02925): r_k ~ Bernoulli(p) decides for each part and batch whether the
replacement stands in the network or the guide's own, p = min(1, k t + b) rises with the steps, and only replacements
are trained. With p = 1 what is trained is the converted network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from thesean.passes.graph.walk import value_of
from thesean.passes.plan.hybrid import Hybrid


def probability(step: int, steps: int, begin: float, all_at: float) -> float:
    """That a part is swapped in at `step` of 0..steps-1: rises from `begin` to 1 over the share `all_at` of them."""
    return begin + (1 - begin) * min(1.0, step / max(1.0, all_at * steps))


class _Run(NamedTuple):
    """What is computed, in order; for each node whom else it stands for, and what nothing reads any more after it."""

    nodes: list[fx.Node]
    others: list[list[fx.Node]]
    dead: list[list[fx.Node]]
    output: fx.Node


class Swapping:
    """`output(parts, inputs)`: the guide's graph in which these parts are the hybrid's.

    Masks that replacements read, casts and what else stands between a part's ends are the hybrid's nodes. Nothing here
    asks for gradients of the guide, nor keeps them from it: see `frozen`.
    """

    def __init__(self, guide: fx.GraphModule, hybrid: Hybrid) -> None:
        self.guide, self.hybrid = guide, hybrid
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

    def output(self, parts: frozenset[int], inputs: Mapping[str, torch.Tensor]) -> Any:
        if parts not in self._runs:
            self._runs[parts] = self._run(parts | self._always)
        run = self._runs[parts]
        env: dict[fx.Node, Any] = {}
        for node, others, dead in zip(run.nodes, run.others, run.dead, strict=True):
            of = self.guide if self._theirs.get(node.name) is node else self.hybrid.graph_module
            value = value_of(of, node, env, inputs)
            env.update(dict.fromkeys((node, *others), value))
            for gone in dead:
                env.pop(gone, None)
        return fx.map_arg(run.output.args[0], env.__getitem__)

    def _run(self, parts: frozenset[int]) -> _Run:
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
        return _Run(nodes, [list(o) for o in others.values()], dead, end)


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
