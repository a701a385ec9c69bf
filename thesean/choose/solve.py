"""The best choice of one candidate a part under additive budgets: a multiple-choice knapsack, solved exactly.

minimise sum_p loss[p, c_p] subject to sum_p cost_b[p, c_p] <= bound_b for every budget b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from thesean.errors import MissingExtraError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`costs[p][c]` is what candidate c of part p adds; `bound` is for their sum."""

    costs: Sequence[Sequence[float]]
    bound: float


def require_solver() -> None:
    """Raises MissingExtraError without scipy: before minutes of probing, not after."""
    if find_spec("scipy") is None:
        raise MissingExtraError("scipy", "auto")


def solve(
    losses: Sequence[Sequence[float]], budgets: Sequence[Budget], count: int = 1, apart: int = 1
) -> list[tuple[int, ...]]:
    """The `count` best choices, best first, each different from the others in `apart` parts or more; fewer when no more
    fit, none when nothing does. Raises MissingExtraError without scipy.
    """
    require_solver()
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    owner = np.repeat(np.arange(len(losses)), [len(row) for row in losses])
    start = np.concatenate([[0], np.cumsum([len(row) for row in losses])[:-1]])
    size = len(owner)
    one_each = csr_array((np.ones(size), (owner, np.arange(size))), shape=(len(losses), size))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for budget in budgets:
        row = np.concatenate([np.asarray(r, dtype=float) for r in budget.costs])
        scale = max(np.abs(row).max(initial=0.0), abs(budget.bound), 1e-30)  # params are 1e9, ms 1e-1: one tolerance
        constraints.append(LinearConstraint(row[None] / scale, -np.inf, budget.bound / scale))
    objective = np.concatenate([np.asarray(row, dtype=float) for row in losses])
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        result = milp(
            objective / max(np.abs(objective).max(initial=0.0), 1e-30),
            constraints=constraints,
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            break
        chosen = [int(np.argmax(result.x[s : s + len(row)])) for s, row in zip(start, losses, strict=True)]
        found.append(tuple(chosen))
        again = np.zeros(size)
        again[start + np.asarray(chosen)] = 1
        constraints.append(LinearConstraint(again[None], -np.inf, len(losses) - apart))
    return found
