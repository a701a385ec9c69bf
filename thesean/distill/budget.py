"""How a budget of time is shared: the closed form takes what it takes, and what is left goes to alignment and
fine-tuning by what a short trial of each gains on held-out data, a second of it.

A trial begins at the solved start. What is kept of it are its gain, the seconds of a step, and which rates did nothing;
its end as well where nothing comes between it and what goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from thesean import ranks
from thesean.curve import Curve
from thesean.distill.align import Stage, stages
from thesean.distill.fine_tune import fine_tune
from thesean.distill.training import Training
from thesean.passes.plan.hybrid import Hybrid
from thesean.units import duration

# What alignment brings parts near to is known at once; fine-tuning looks for its rate.
_ALIGN_STEPS, _TUNE_STEPS = 5, 10
_MOST = 0.5  # of what is left, for alignment: what it brings parts near to is the guide, and not the task


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`gain` of the held-out value, never below 0, in `seconds` of so many `steps`, and what it did at each rate."""

    gain: float
    seconds: float
    steps: int
    curves: tuple[Curve, ...] = ()

    @property
    def rate(self) -> float:
        return self.gain / self.seconds

    def steps_in(self, seconds: float) -> int:
        """As many as fit, at the trial's pace."""
        return max(0, int(seconds * self.steps / self.seconds))


@dataclass(frozen=True, kw_only=True)
class Shares:
    """`align` steps, then fine-tuning as long as there is time, at the pace of `tuning`. `ahead`: all weights after its
    trial, where no step of alignment comes first, and it gained.
    """

    align: int
    tuning: Trial | None
    told: str
    ahead: dict[str, torch.Tensor] | None = None

    def to_dict(self) -> dict[str, Any]:
        tuning = None if self.tuning is None else asdict(self.tuning)
        return {"align": self.align, "tuning": tuning, "told": self.told, "ahead": self.ahead}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Shares:
        tuning = data["tuning"]
        if tuning is not None:
            tuning = Trial(**{**tuning, "curves": tuple(Curve.from_dict(c) for c in tuning["curves"])})
        return Shares(**{**data, "tuning": tuning})

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

    def align() -> tuple[Curve, ...]:
        for stage in stages(recipe.alignment.schedule, len(hybrid.parts), _ALIGN_STEPS):
            step = partial(_aligned, run_stage, stage)
            training.journal.piece(f"trial stage {stage.number + 1}", step, hybrid.graph_module)
        return ()

    def tune() -> tuple[Curve, ...]:
        return fine_tune(hybrid, training, _TUNE_STEPS, phase="trial").curves

    aligning = _trial(hybrid, training, align, _ALIGN_STEPS)[0] if aligns else None
    tuning, end = _trial(hybrid, training, tune, _TUNE_STEPS) if tunes else (None, None)
    share, how = recipe.alignment.share, "as the recipe shares"
    if aligning is None or tuning is None:
        share, how = (1.0 if aligning else 0.0), "all that the recipe has"
    elif at_once and aligning.rate + tuning.rate > 0:
        share = min(_MOST, aligning.rate / (aligning.rate + tuning.rate))
        how = f"by a trial's gain a second, {aligning.rate:.3g} and {tuning.rate:.3g}"
    left = max(0.0, training.left)
    tried = [str(trial.steps) for trial in (aligning, tuning) if trial is not None]
    trials = f"{duration(begun - left)} for {'trials' if len(tried) > 1 else 'a trial'} of {' and '.join(tried)} steps"
    shares = f"of the rest {share:.0%} for alignment and {1 - share:.0%} for fine-tuning, {how}"
    told = f"budget {duration(training.seconds)}: {spent}, {trials}; {shares}"
    steps = 0 if aligning is None else aligning.steps_in(share * left)
    follows = not steps and recipe.max_drop is None  # parts that are given up would be others' weights
    return Shares(align=steps, tuning=tuning, told=told, ahead=end if follows else None)


def _aligned(run_stage: Callable[[Stage], object], stage: Stage) -> None:
    run_stage(stage)


def _trial(
    hybrid: Hybrid, training: Training, run: Callable[[], tuple[Curve, ...]], steps: int
) -> tuple[Trial, dict[str, torch.Tensor] | None]:
    """What was found, and where it gained all weights at the end. The hybrid is left as it was."""
    graph_module = hybrid.graph_module
    start = {name: value.clone() for name, value in graph_module.state_dict().items()}
    before = training.judge.value(graph_module, training.judge.sample)
    begun = time.monotonic()
    curves = run()
    (seconds,) = ranks.agreed(time.monotonic() - begun)
    gain = before - training.judge.value(graph_module, training.judge.sample)
    gain = max(0.0, gain) if gain == gain else 0.0
    end = {name: value.clone() for name, value in graph_module.state_dict().items()} if gain else None
    graph_module.load_state_dict(start)
    graph_module.eval()
    return Trial(gain=gain, seconds=max(seconds, 1e-6), steps=steps, curves=curves), end
