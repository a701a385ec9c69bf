"""What each hybrid on the way puts out, without building it: the whole hybrid's activations up to where its first k
parts end, and the guide's graph from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.nodes import above, from_inputs
from thesean.passes.graph.walk import Inputs, Walk, output_from
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid
from thesean.passes.plan.sites import ends_of


class Partials:
    """`output(count, number)` is what the hybrid with the first `count` parts replaced gives on a batch.

    Counts come in order, and each batch's activations are in hand from one to the next. Whoever changes a part that was
    run already calls `forget`. The values are those of `build_hybrid(bound_plan, count)`, bit for bit.
    """

    def __init__(self, guide: fx.GraphModule, hybrid: Hybrid, batches: Sequence[Inputs]) -> None:
        self.guide, self.hybrid, self.batches = guide, hybrid, batches
        self._reads = from_inputs(guide.graph)
        self._exits = {r.guide_exit: r.exit for r in hybrid.replacements}
        self._needs = _parts_needed(hybrid)
        self._rests = [self._rest(count) for count in range(1, len(hybrid.parts) + 1)]
        steps = [[self._stand_in(n) for n in known] for known, _ in self._rests]
        self._walk = Walk(hybrid.graph_module, steps, batches)

    def forget(self) -> None:
        self._walk.forget()

    @torch.no_grad()
    def output(self, count: int, number: int) -> Any:
        """The hybrid is in eval mode by then."""
        known, run = self._rests[count - 1]
        values = self._walk.get(count - 1, number)
        env = {node: values[self._stand_in(node)] for node in known}
        del values
        return output_from(self.guide, run, env, self.batches[number])

    def _rest(self, count: int) -> tuple[list[fx.Node], list[fx.Node]]:
        """The guide's nodes that the hybrid has values of once `count` parts are replaced, and those to run from them.

        Constants are run: all of the guide's cast weights at once would take as much room as the weights.
        """
        settled = {n for n in self._reads if self._needs.get(self._stand_in(n), count + 1) <= count}
        needed = above(self.guide.graph.output_node().all_input_nodes, settled)
        ends = self.guide.graph.output_node().all_input_nodes
        known = dict.fromkeys(i for n in needed for i in n.all_input_nodes if i in settled)
        known.update(dict.fromkeys(n for n in ends if n in settled))
        return list(known), [n for n in self.guide.graph.nodes if n in needed]

    def _stand_in(self, node: fx.Node) -> str:
        """The name of the hybrid's node that has taken this one's place, if it has one."""
        return self._exits.get(node.name, node.name)


def stand_apart(bound_plan: BoundPlan, hybrid: Hybrid) -> bool:
    """Whether each part is cut out in the same way with the later ones as without them.

    It isn't where parallel branches of one sum are dropped: what stands for both depends on both.
    """
    sites = [p.sites for p in bound_plan.parts if p.target is not None]
    whole = ends_of([s for row in sites for s in row])
    if len(hybrid.replacements) < len(whole):
        return False
    firsts = [ends_of([s for row in sites[:count] for s in row]) for count in range(1, len(sites))]
    return all(found == whole[: len(found)] for found in firsts)


def _parts_needed(hybrid: Hybrid) -> dict[str, int]:
    """Name -> how many of the first parts a node's value depends on."""
    part_of = {r.name: r.part for r in hybrid.replacements}
    found: dict[fx.Node, int] = {}
    for node in hybrid.graph_module.graph.nodes:
        own = part_of.get(str(node.target), -1) + 1 if node.op == "call_module" else 0
        found[node] = max([own, *(found[i] for i in node.all_input_nodes)])
    return {node.name: count for node, count in found.items()}
