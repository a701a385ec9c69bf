"""Which parts stay the guide's where some may: those that it can least do without.

Every part is solved on few batches, and stands alone in the guide. It is judged on batches that, where they are of
sequences, say again at their end what they said at their beginning (`repeating.py`), and on the same as they are: on
one of them, and on further ones as long as it isn't plain whether it is to be kept.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
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

# A part that does so many times the harm of those that aren't to be kept, or so many times less than those that are, is
# judged no further.
_PLAIN = 4.0


def keep_best(bound_plan: BoundPlan, training: Training) -> BoundPlan:
    """The plan with as many parts kept as the recipe asks for. Raises PlanError where none would be replaced."""
    count, replaced = training.recipe.keep_best, [p.planned.path for p in bound_plan.parts if p.target is not None]
    if not count:
        return bound_plan
    if count >= len(replaced):
        raise PlanError(f"keep_best={count}: the plan replaces {len(replaced)} parts, and one at least must be.")
    found: dict[str, Any] = training.journal.piece("harm", lambda: _harm(bound_plan, replaced, training, count))
    alone, repeats = {path: float(value) for path, value in found["alone"].items()}, bool(found["repeats"])
    on = " on sequences that end as they begin" if repeats else ""
    for path in _by_harm(alone)[:count]:
        why = f"kept: with it alone replaced the network is {alone[path]:.4g} from the guide{on}"
        bound_plan = without(bound_plan, path, why)
    return bound_plan


def _by_harm(alone: Mapping[str, float]) -> list[str]:
    """Those that do most first, before them those that leave no number."""
    return sorted(alone, key=lambda path: (math.isnan(alone[path]), alone[path]), reverse=True)


def _harm(bound_plan: BoundPlan, paths: Sequence[str], training: Training, count: int) -> dict[str, Any]:
    """The divergence of the guide with one part alone replaced, as exactly as the `count` worst can be told by."""
    batches, guide = training.feed.take(_SOLVED_ON), training.guide
    views = _solved_alone(bound_plan, paths, training, training.inputs(batches))
    # on what it was solved on: what is held out tells how good the choice is
    judged, repeats = _judged(batches[:_JUDGED_ON], bound_plan.captured.signature)
    judge = Judge(guide, replace(training.task, loss=None, metric=None), judged)
    reads = {path: shared(view, guide) for path, view in views.items()}
    tails = {path: Tail(view, reads[path]) for path, view in views.items()}
    inputs, step = [own for _, own in judge.batches], {path: number for number, path in enumerate(paths)}
    walk = Walk(guide, [sorted(reads[path]) for path in paths], inputs)
    harm: dict[str, list[float]] = {path: [] for path in paths}
    near: Sequence[str] = paths
    for batch in judge.everything:  # one after the other: the guide's outputs of all may be as large as the guide
        for path in near:
            with evaluating(views[path]):
                found = judge.of(lambda at, of=path: tails[of].output(walk.get(step[of], at), inputs[at]), [batch])  # type: ignore[misc]
            harm[path].append(found.divergence)
        judge.forget()
        alone = {path: statistics.fmean(values) for path, values in harm.items()}
        least, most = (alone[path] for path in _by_harm(alone)[count - 1 : count + 1])  # of those in, and of those out
        near = [path for path in near if not (alone[path] > _PLAIN * most or _PLAIN * alone[path] < least)]
    for path, value in alone.items():
        logger.info("%s: %.4g with it alone replaced", path, value)
    return {"alone": alone, "repeats": repeats}


def _solved_alone(
    bound_plan: BoundPlan, paths: Sequence[str], training: Training, batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, fx.GraphModule]:
    """The guide with one part replaced and solved, by the part's path."""
    hybrid, parts = trial_hybrid(bound_plan, share=True), range(len(paths))
    views = [view_of(bound_plan, hybrid, [number]) for number in parts]
    # in each view all before its part is the guide's, nodes of the same names
    alone = replace(hybrid, replacements=tuple(r for view in views for r in view.replacements))
    form, guide = training.recipe.closed_form, training.guide
    solver = solver_by(form, guide, alone, parts, batches, preparing=True, alone=True)
    for number, path in enumerate(paths):
        training.observer.begin("keep", path, number + 1, len(paths), 0)
        solver.solve(number)
        training.observer.end({})
    return {path: view.graph_module for path, view in zip(paths, views, strict=True)}


def _judged(few: Sequence[Batch], signature: Signature) -> tuple[list[Batch], bool]:
    """These batches as they are, and before them the same made to repeat themselves; whether they can be."""
    others = [inputs for _, inputs in (*few[1:], few[0])]
    again = [(whole, repeating(inputs, other, signature)) for (whole, inputs), other in zip(few, others, strict=True)]
    repeats = [(whole, inputs) for whole, inputs in again if inputs is not None]
    return [*repeats, *few], bool(repeats)


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
