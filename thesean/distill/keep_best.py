"""Which parts stay the guide's where some may: those that it can least do without.

Every part is solved on few batches, and stands alone in the guide; where batches are sequences, half of those that it
is judged on say again at their end what they said at their beginning (`repeating.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from thesean.distill.closed_form import solver_by
from thesean.distill.evaluate import Judge
from thesean.distill.repeating import repeating
from thesean.distill.task import Batch
from thesean.distill.training import Training
from thesean.errors import PlanError
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import above, from_inputs
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.tail import Tail
from thesean.passes.graph.walk import Walk
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import trial_hybrid, view_of
from thesean.passes.plan.without import without

logger = logging.getLogger(__name__)

# For a rank order of parts; a part's harm is far from what a batch more would tell.
_SOLVED_ON, _JUDGED_ON = 4, 2


def keep_best(bound_plan: BoundPlan, training: Training) -> BoundPlan:
    """The plan with as many parts kept as the recipe asks for. Raises PlanError where none would be replaced."""
    count, replaced = training.recipe.keep_best, [p.planned.path for p in bound_plan.parts if p.target is not None]
    if not count:
        return bound_plan
    if count >= len(replaced):
        raise PlanError(f"keep_best={count}: the plan replaces {len(replaced)} parts, and one at least must be.")
    found: dict[str, Any] = training.journal.piece("harm", lambda: _harm(bound_plan, replaced, training))
    alone, repeats = {path: float(value) for path, value in found["alone"].items()}, bool(found["repeats"])
    on = " on sequences half of which repeat themselves" if repeats else ""
    for path in sorted(alone, key=lambda path: (not math.isnan(alone[path]), alone[path]), reverse=True)[:count]:
        why = f"kept: with it alone replaced the network is {alone[path]:.4g} from the guide{on}"
        bound_plan = without(bound_plan, path, why)
    return bound_plan


def _harm(bound_plan: BoundPlan, paths: Sequence[str], training: Training) -> dict[str, Any]:
    """The divergence of the guide with each part alone replaced."""
    batches, guide, parts = training.feed.take(_SOLVED_ON), training.guide, range(len(paths))
    hybrid = trial_hybrid(bound_plan, share=True)
    views = [view_of(bound_plan, hybrid, [number]) for number in parts]
    # in each view all before its part is the guide's, nodes of the same names
    alone = replace(hybrid, replacements=tuple(r for view in views for r in view.replacements))
    form, solving = training.recipe.closed_form, training.inputs(batches)
    solver = solver_by(form, guide, alone, parts, solving, preparing=True, reading=guide)
    for number, path in enumerate(paths):
        training.observer.begin("keep", path, number + 1, len(paths), 0)
        solver.solve(number)
        training.observer.end({})
    # on what it was solved on: what is held out tells how good the choice is
    judged, repeats = _judged(batches, bound_plan.captured.signature)
    judge = Judge(guide, replace(training.task, loss=None, metric=None), judged)
    networks = [view.graph_module for view in views]
    reads = [shared(network, guide) for network in networks]
    tails = [Tail(network, names) for network, names in zip(networks, reads, strict=True)]
    inputs = [own for _, own in judge.batches]
    walk = Walk(guide, [sorted(names) for names in reads], inputs)
    found = {}
    for number, path in enumerate(paths):
        with evaluating(networks[number]):
            harm = judge.of(lambda batch, k=number: tails[k].output(walk.get(k, batch), inputs[batch]))  # type: ignore[misc]
        found[path] = harm.divergence
        logger.info("%s: %.4g with it alone replaced", path, found[path])
    return {"alone": found, "repeats": repeats}


def _judged(batches: Sequence[Batch], signature: Signature) -> tuple[list[Batch], bool]:
    """A few of the batches, half of them made to repeat themselves where they can be, and whether they are."""
    few = list(batches[:_JUDGED_ON])
    whole, inputs = few[-1]
    again = repeating(inputs, few[0][1], signature)
    return (few if again is None else [*few[: _JUDGED_ON - 1], (whole, again)]), again is not None


def shared(graph_module: fx.GraphModule, other: fx.GraphModule) -> frozenset[str]:
    """Names of the values that another network has too, and that this one reads after it parts from it. Both are made
    of one guide: nodes of one name, and of the same ones before, have the same values.
    """
    known, graph = {_identity(n) for n in other.graph.nodes}, graph_module.graph
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if _identity(node) not in known or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    settled = from_inputs(graph) - changed
    needed = above(graph.output_node().all_input_nodes, settled)
    ends = [n for n in graph.output_node().all_input_nodes if n in settled]
    return frozenset({i.name for n in needed for i in n.all_input_nodes if i in settled} | {n.name for n in ends})


def _identity(node: fx.Node) -> tuple[str, ...]:
    return node.name, node.op, str(node.target), *(i.name for i in node.all_input_nodes)
