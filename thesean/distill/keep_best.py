"""Which parts stay the guide's where some may: those whose return helps most.

Every part is replaced and solved, on few batches; then each in turn is the guide's again.
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
from thesean.distill.training import Training
from thesean.errors import PlanError
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import above, from_inputs
from thesean.passes.graph.tail import Tail
from thesean.passes.graph.walk import Walk
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import trial_hybrid, view_of
from thesean.passes.plan.without import without

logger = logging.getLogger(__name__)

# For a rank order of parts; a part's return is far from what a batch more would tell.
_SOLVED_ON, _JUDGED_ON = 4, 2


def keep_best(bound_plan: BoundPlan, training: Training) -> BoundPlan:
    """The plan with as many parts kept as the recipe asks for. Raises PlanError where none would be replaced."""
    count, replaced = training.recipe.keep_best, [p.planned.path for p in bound_plan.parts if p.target is not None]
    if not count:
        return bound_plan
    if count >= len(replaced):
        raise PlanError(f"keep_best={count}: the plan replaces {len(replaced)} parts, and one at least must be.")
    found: dict[str, Any] = training.journal.piece("keep", lambda: _returns(bound_plan, replaced, training))
    whole, alone = float(found["whole"]), {path: float(value) for path, value in found["alone"].items()}
    for path in sorted(alone, key=lambda path: (math.isnan(alone[path]), alone[path]))[:count]:
        why = f"kept: with all replaced the network is {whole:.4g} from the guide, without this one {alone[path]:.4g}"
        bound_plan = without(bound_plan, path, why)
    return bound_plan


def _returns(bound_plan: BoundPlan, paths: Sequence[str], training: Training) -> dict[str, Any]:
    """The divergence of the hybrid, and of those with one part less."""
    batches = training.feed.take(_SOLVED_ON)
    hybrid = trial_hybrid(bound_plan, share=True)
    parts = range(len(hybrid.parts))
    solving = training.inputs(batches)
    solver = solver_by(training.recipe.closed_form, training.guide, hybrid, parts, solving, preparing=True)
    for number, path in enumerate(paths):
        training.observer.begin("keep", path, number + 1, len(paths), 0)
        solver.solve(number)
        training.observer.end({})
    # on what it was solved on: what is held out tells how good the choice is
    judge = Judge(training.guide, replace(training.task, loss=None, metric=None), batches[:_JUDGED_ON])
    views = [view_of(bound_plan, hybrid, [k for k in parts if k != number]).graph_module for number in parts]
    reads = [shared(view, hybrid.graph_module) for view in views]
    tails = [Tail(view, names) for view, names in zip(views, reads, strict=True)]
    inputs = [own for _, own in judge.batches]
    alone = {}
    with evaluating(hybrid.graph_module):
        whole = judge(hybrid.graph_module).divergence
        walk = Walk(hybrid.graph_module, [sorted(names) for names in reads], inputs)
        for number, path in enumerate(paths):
            with evaluating(views[number]):
                found = judge.of(lambda batch, k=number: tails[k].output(walk.get(k, batch), inputs[batch]))  # type: ignore[misc]
            alone[path] = found.divergence
            logger.info("%s: %.4g without it", path, alone[path])
    return {"whole": whole, "alone": alone}


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
