"""What a stage leaves behind: the hybrid's modules as they were right after it, and how good it was."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from thesean.distill.align import StageResult
from thesean.distill.evaluate import Evaluation
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, trial_hybrid

State = dict[str, dict[str, torch.Tensor]]  # module name in the hybrid -> its state_dict


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The target modules right after a stage. Later stages do not touch it."""

    parts: tuple[int, ...]  # those that are replaced, in the order in which they were
    state: State
    evaluation: Evaluation
    result: StageResult | None
    seconds: float

    @property
    def count(self) -> int:
        return len(self.parts)


def with_state(bound_plan: BoundPlan, parts: int | Collection[int], state: State) -> Hybrid:
    """The hybrid with the first so many parts, or these, replaced by modules in this state, the rest the guide's."""
    hybrid = trial_hybrid(bound_plan, parts)
    for replacement in hybrid.replacements:
        hybrid.module(replacement).load_state_dict(state.get(replacement.name, {}))
    hybrid.graph_module.eval()
    return hybrid
