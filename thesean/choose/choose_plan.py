"""From a divided guide and a budget to plans: the entry of this package."""

from __future__ import annotations

from collections.abc import Sequence

from thesean.choose.candidates import find_candidates
from thesean.choose.choose import choose
from thesean.choose.constraints import Constraints
from thesean.choose.quality import Prober
from thesean.choose.solve import require_solver
from thesean.deploy.loaded import require
from thesean.distill.training import Training
from thesean.passes.graph.dump import not_dumping
from thesean.passes.plan.divide import Division
from thesean.passes.plan.plan import Plan
from thesean.targets import Target


def choose_plans(
    division: Division,
    constraints: Sequence[Constraints],
    candidates: Sequence[str | Target] | None,
    training: Training,
) -> list[Plan]:
    """The plans that target "auto" finds, one a budget, from one probing. Raises PlanError, UnknownNameError,
    TargetMismatchError, MissingExtraError.
    """
    require_solver()
    if any(one.measures for one in constraints):
        require("onnx", "onnxruntime", "onnxscript")
    found = find_candidates(division, candidates)
    training.try_loss()
    with not_dumping():  # trials, hundreds of them
        return choose(found, Prober(found, training), constraints)
