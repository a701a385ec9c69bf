"""From a divided guide and a budget to a plan: the entry of this package."""

from __future__ import annotations

from collections.abc import Sequence

from thesean.choose.candidates import find_candidates
from thesean.choose.constraints import Constraints
from thesean.choose.quality import Prober
from thesean.choose.search import choose
from thesean.choose.solve import require_solver
from thesean.deploy.loaded import require
from thesean.distill.training import Training
from thesean.passes.graph.dump import not_dumping
from thesean.passes.plan.divide import Division
from thesean.passes.plan.plan import Plan
from thesean.targets import Target


def choose_plan(
    division: Division, constraints: Constraints, candidates: Sequence[str | Target] | None, training: Training
) -> Plan:
    """The plan that target "auto" finds. Raises PlanError, UnknownNameError, TargetMismatchError, MissingExtraError."""
    require_solver()
    if constraints.measures:
        require("onnx", "onnxruntime", "onnxscript")
    found = find_candidates(division, candidates)
    with not_dumping():  # trials, hundreds of them
        return choose(found, Prober(found, training), constraints)
