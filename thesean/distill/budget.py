"""How a budget of time is shared: the closed form takes what it takes, and what is left goes to alignment and
fine-tuning by what a short trial of each gains on held-out data, a second of it.

A trial begins at the solved start, and its end is thrown away: what is kept are its gain and the seconds of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from thesean import ranks
from thesean.distill.align import Stage, stages
from thesean.distill.fine_tune import fine_tune
from thesean.distill.training import Training
from thesean.passes.plan.hybrid import Hybrid
from thesean.units import duration

_TRIAL_STEPS = 10
_MOST = 0.5  # of what is left, for alignment: what it brings parts near to is the guide, and not the task


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`gain` of the held-out value, never below 0, in `seconds` of so many `steps`."""

    gain: float
    seconds: float
    steps: int

    @property
    def rate(self) -> float:
        return self.gain / self.seconds

    def steps_in(self, seconds: float) -> int:
        """As many as fit, at the trial's pace."""
        return max(0, int(seconds * self.steps / self.seconds))


@dataclass(frozen=True, kw_only=True)
class Shares:
    """`align` steps, then fine-tuning as long as there is time, at the pace of `tuning`."""

    align: int
    tuning: Trial | None
    told: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Shares:
        return Shares(**{**data, "tuning": None if data["tuning"] is None else Trial(**data["tuning"])})

    def tuning_steps(self, training: Training) -> int:
        return 0 if self.tuning is None else self.tuning.steps_in(training.left)


def shared(hybrid: Hybrid, training: Training, run_stage: Callable[[Stage], object]) -> Shares:
    """What the seconds left are spent on; `run_stage` aligns. The hybrid is left as it was."""
    recipe, begun = training.recipe, training.left
    at_once = recipe.alignment.at_once
    aligns, tunes = recipe.alignment.schedule != "none" and recipe.alignment.share > 0, recipe.fine_tuning.share > 0
    spent = f"{duration(training.seconds - begun)} until the closed form was solved"
    if not recipe.steps or begun <= 0 or not (aligns or tunes):
        why = "no time was left" if recipe.steps else f"the recipe {recipe.name!r} takes no steps"
        return Shares(align=0, tuning=None, told=f"budget {duration(training.seconds)}: {spent}; {why}")

    def align() -> None:
        for stage in stages(recipe.alignment.schedule, len(hybrid.parts), _TRIAL_STEPS):
            step = partial(_aligned, run_stage, stage)
            training.journal.piece(f"trial stage {stage.number + 1}", step, hybrid.graph_module)

    def tune() -> None:
        fine_tune(hybrid, training, _TRIAL_STEPS, phase="trial")

    aligning = _trial(hybrid, training, align) if aligns else None
    tuning = _trial(hybrid, training, tune) if tunes else None
    share, how = recipe.alignment.share, "as the recipe shares"
    if aligning is None or tuning is None:
        share, how = (1.0 if aligning else 0.0), "all that the recipe has"
    elif at_once and aligning.rate + tuning.rate > 0:
        share = min(_MOST, aligning.rate / (aligning.rate + tuning.rate))
        how = f"by a trial's gain a second, {aligning.rate:.3g} and {tuning.rate:.3g}"
    left = max(0.0, training.left)
    trials = f"{duration(begun - left)} for trials of {_TRIAL_STEPS} steps each"
    shares = f"of the rest {share:.0%} for alignment and {1 - share:.0%} for fine-tuning, {how}"
    told = f"budget {duration(training.seconds)}: {spent}, {trials}; {shares}"
    steps = 0 if aligning is None else aligning.steps_in(share * left)
    return Shares(align=steps, tuning=tuning, told=told)


def _aligned(run_stage: Callable[[Stage], object], stage: Stage) -> None:
    run_stage(stage)


def _trial(hybrid: Hybrid, training: Training, run: Callable[[], None]) -> Trial:
    graph_module = hybrid.graph_module
    start = {name: value.clone() for name, value in graph_module.state_dict().items()}
    before = training.judge.value(graph_module, training.judge.sample)
    begun = time.monotonic()
    run()
    (seconds,) = ranks.agreed(time.monotonic() - begun)
    gain = before - training.judge.value(graph_module, training.judge.sample)
    graph_module.load_state_dict(start)
    graph_module.eval()
    return Trial(gain=max(0.0, gain) if gain == gain else 0.0, seconds=max(seconds, 1e-6), steps=_TRIAL_STEPS)
