"""From a captured guide and a budget to a plan: the entry of this package."""

from __future__ import annotations

from collections.abc import Sequence

from thesean.choose.candidates import find_candidates
from thesean.choose.constraints import Constraints
from thesean.choose.quality import Effort, Prober
from thesean.choose.search import choose
from thesean.choose.solve import require_solver
from thesean.deploy.session import require
from thesean.distill.data import Feed
from thesean.distill.observer import Observer
from thesean.distill.task import Task
from thesean.errors import PlanError
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.dump import not_dumping
from thesean.passes.plan.bind import Binder
from thesean.passes.plan.make_plan import find_groups, group_matches, kept_members, settings_of
from thesean.passes.plan.partition import Granularity, no_match, partition
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe
from thesean.targets import Target


def choose_plan(
    captured: Captured,
    constraints: Constraints,
    candidates: Sequence[str | Target] | None,
    *,
    parts: Sequence[str] | None,
    keep: Sequence[str],
    granularity: Granularity,
    merge: int | None,
    target_parts: int | None,
    task: Task,
    feed: Feed,
    recipe: Recipe,
    seed: int,
    observer: Observer,
) -> Plan:
    """The plan that target "auto" finds. Raises PlanError, UnknownNameError, TargetMismatchError, MissingExtraError."""
    require_solver()
    if constraints.measures:
        require("onnx", "onnxruntime", "onnxscript")
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    parts = (parts,) if isinstance(parts, str) else parts
    flow = data_flow(captured.graph_module.graph)
    groups = find_groups(captured, flow, partition(flow, granularity, parts), merge, target_parts)
    for glob in keep:
        if not any(group_matches(g, glob) for g in groups):
            raise PlanError(f"keep: {no_match(glob, [g.path for g in groups])}")
    found = find_candidates(
        Binder(captured, flow),
        groups,
        kept_members(captured, groups, {}),
        candidates,
        {g.path: any(group_matches(g, glob) for glob in keep) for g in groups},
        settings_of(flow, groups, granularity, parts),
    )
    solving = feed.batches.first(recipe.closed_form.batches)
    prober = Prober(found, task, solving, feed.held_out, recipe, Effort(), seed, observer)
    with not_dumping():  # trials, hundreds of them
        return choose(found, prober, constraints, feed.length)
