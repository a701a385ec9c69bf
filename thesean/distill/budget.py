"""How a run's seconds or steps are shared: the closed form takes what it takes, and what is left goes to alignment and
fine-tuning by what a short trial of each gains on held-out data: of seconds a second of it, of steps a step.

A trial begins at the solved start. What is kept of it are its gain, the seconds of a step, and which rates did nothing;
of the one that gained more its end as well, where nothing comes between it and what goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thesean import ranks
from thesean.curve import Curve
from thesean.distill.align import Stage, StageResult, stages
from thesean.distill.fine_tune import Tuned, fine_tune
from thesean.distill.training import Training
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.hybrid import Hybrid
from thesean.units import duration

# Of the time left, for a trial of each, and steps that it takes at most: 40 tell which of the two gains more, where ten
# may have done nothing yet (benchmarks/results/trials.json).
_TRIAL, _TRIAL_STEPS = 0.08, 40
# The same of a number of steps. Of few a trial that tells anything would take too many.
_TRIAL_SHARE, _LEAST_TRIAL = 0.1, 20
# Outputs of fewer numbers than this, beside those at parts' exits, say so little of an example that alignment may bring
# a network much further; of more the trial costs more than it finds (benchmarks/results/unlabelled.json).
_FEW_OUTPUTS = 0.1
# Of what is left, for alignment, where it gained more: what it brings parts near to is the guide, and not the task.
_MOST, _MOST_WITHOUT_LOSS = 0.5, 0.8


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`gain` of the held-out value, never below 0, in `seconds` of so many `steps`, and what it did in each run. The
    steps alone took `stepping` of these, where that was measured: what comes before and after doesn't grow with them.
    """

    gain: float
    seconds: float
    steps: int
    stepping: float | None = None
    curves: tuple[Curve, ...] = ()

    @property
    def rate(self) -> float:
        return self.gain / self.seconds

    def steps_in(self, seconds: float) -> int:
        """As many as fit, at the trial's pace."""
        return max(0, int(seconds * self.steps / (self.stepping or self.seconds)))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Trial:
        return Trial(**{**data, "curves": tuple(Curve.from_dict(c) for c in data["curves"])})


@dataclass(frozen=True, kw_only=True)
class Shares:
    """`align` steps, then fine-tuning: as long as there is time, at the pace of `tuning`; of a number of steps what is
    left. `aligned`, `tuned`: all weights after the trial that is gone on from.
    """

    align: int
    tuning: Trial | None
    told: str
    aligning: Trial | None = None
    aligned: dict[str, torch.Tensor] | None = None
    tuned: dict[str, torch.Tensor] | None = None

    @property
    def curves(self) -> tuple[Curve, ...]:
        """Of all that was tried; from what isn't gone on from nothing is kept."""
        found: list[Curve] = []
        for trial, ahead in ((self.aligning, self.aligned), (self.tuning, self.tuned)):
            left = trial.curves if trial is not None else ()
            found += left if ahead is not None else [replace(curve, kept=0) for curve in left]
        return tuple(found)

    @property
    def steps(self) -> int:
        """Of all that was tried."""
        return sum(trial.steps for trial in (self.aligning, self.tuning) if trial is not None)

    def to_dict(self) -> dict[str, Any]:
        trials = {name: None if (t := getattr(self, name)) is None else asdict(t) for name in ("aligning", "tuning")}
        return {"align": self.align, **trials, "told": self.told, "aligned": self.aligned, "tuned": self.tuned}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Shares:
        trials = {name: None if (t := data[name]) is None else Trial.from_dict(t) for name in ("aligning", "tuning")}
        return Shares(**{**data, **trials})

    def tuning_steps(self, training: Training, aligned: int) -> int:
        """What is left after so many steps of alignment."""
        if training.recipe.seconds is None:
            return training.recipe.steps - self.steps - aligned
        return 0 if self.tuning is None else self.tuning.steps_in(training.left)


RunStage = Callable[[Stage, Training], StageResult]


def tries(hybrid: Hybrid, training: Training) -> bool:
    """Whether a trial tells how a number of steps is shared: where the recipe leaves it to one, the steps suffice, and
    nothing but the guide's outputs is trained for, which are few.
    """
    recipe = training.recipe
    return (
        recipe.alignment.share == "auto"
        and recipe.alignment.at_once
        and recipe.fine_tuning.share > 0
        and recipe.max_drop is None  # parts that are given up would be others' weights
        and training.task.loss is None
        and _TRIAL_SHARE * recipe.steps >= _LEAST_TRIAL
        and _outputs_to_exits(hybrid, training) < _FEW_OUTPUTS
    )


@torch.no_grad()
def _outputs_to_exits(hybrid: Hybrid, training: Training) -> float:
    """How many numbers the guide gives for one at a part's exit, on a held-out batch."""
    exits = [theirs for _, theirs in hybrid.boundaries]
    found = intermediates(training.guide, exits)(**training.judge.batches[0][1])
    outputs, inner = (
        sum(v.numel() for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor) and v.is_floating_point())
        for values in (found["output"], [found[name] for name in exits])
    )
    return ranks.agreed(outputs * len(exits) / max(1, inner))[0]


def shared_steps(hybrid: Hybrid, training: Training, run_stage: RunStage) -> Shares:
    """What a number of steps is spent on; `run_stage` aligns. The hybrid is left as it was."""
    steps = training.recipe.steps
    count = min(_TRIAL_STEPS, int(_TRIAL_SHARE * steps))
    aligning, aligned = _trial(hybrid, training, _Alignment(hybrid, run_stage, count), math.inf)
    tuning, tuned = _trial(hybrid, training, _Tuning(hybrid, count), math.inf)
    gains = f"after {count} steps of either alignment gained {aligning.gain:.3g} on held-out data, fine-tuning"
    told = f"steps: {gains} {tuning.gain:.3g}"
    if aligning.gain > tuning.gain:
        more = max(0, round(_MOST_WITHOUT_LOSS * steps) - aligning.steps)
        told += f"; up to {aligning.steps + more} are alignment's"
        return Shares(align=more, aligning=aligning, tuning=tuning, aligned=aligned, told=told)
    told += "; all others are fine-tuning's"
    return Shares(align=0, aligning=aligning, tuning=tuning, tuned=tuned, told=told)


def shared(hybrid: Hybrid, training: Training, run_stage: RunStage, settling: float = 0.0) -> Shares:
    """What the seconds left are spent on; `run_stage` aligns, and what it made of parts takes `settling` seconds each
    time that it is judged: last layers are solved anew. The hybrid is left as it was.
    """
    recipe, begun = training.recipe, training.left
    at_once = recipe.alignment.at_once
    aligns = recipe.alignment.schedule != "none" and round(recipe.steps * recipe.alignment.usual) > 0
    tunes = recipe.fine_tuning.share > 0
    spent = f"{duration(training.seconds - begun)} until the closed form was solved"
    if not recipe.steps or begun <= 0 or not (aligns or tunes):
        why = "no time was left" if recipe.steps else f"the recipe {recipe.name!r} takes no steps"
        return Shares(align=0, tuning=None, told=f"budget {duration(training.seconds)}: {spent}; {why}")
    seconds = _TRIAL * begun
    dear = aligns and tunes and settling > seconds
    aligns = aligns and not dear
    alignment, fine_tuning = _Alignment(hybrid, run_stage, _TRIAL_STEPS), _Tuning(hybrid, _TRIAL_STEPS)
    aligning, aligned = _trial(hybrid, training, alignment, seconds) if aligns else (None, None)
    tuning, tuned = _trial(hybrid, training, fine_tuning, seconds) if tunes else (None, None)
    share, how = recipe.alignment.usual, "as the recipe shares"
    if aligning is None or tuning is None:
        share, how = (1.0 if aligning else 0.0), "all that the recipe has"
        if dear:
            how = f"as judging what is aligned takes {duration(settling)}, and a trial has {duration(seconds)}"
    elif at_once and not aligning.rate + tuning.rate and recipe.fine_tuning.learning_rate == "find":
        share, how = 0.0, "neither trial having gained: fine-tuning has lower rates"
    elif at_once and aligning.rate + tuning.rate > 0:
        most = _MOST if training.task.loss is not None else _MOST_WITHOUT_LOSS
        share = most if aligning.rate > tuning.rate else 0.0
        how = f"by a trial's gain a second, {aligning.rate:.3g} and {tuning.rate:.3g}"
    left = max(0.0, training.left)
    tried = [str(trial.steps) for trial in (aligning, tuning) if trial is not None]
    trials = f"{duration(begun - left)} for {'trials' if len(tried) > 1 else 'a trial'} of {' and '.join(tried)} steps"
    shares = f"of the rest {share:.0%} for alignment and {1 - share:.0%} for fine-tuning, {how}"
    told = f"budget {duration(training.seconds)}: {spent}, {trials}; {shares}"
    steps = 0 if aligning is None else aligning.steps_in(share * left)
    if recipe.max_drop is not None or (steps and not at_once):  # other weights come in between
        aligned = tuned = None
    ahead = {"aligned": aligned} if steps else {"tuned": tuned}
    return Shares(align=steps, aligning=aligning, tuning=tuning, told=told, **ahead)


@dataclass(frozen=True)
class _Alignment:
    """So many steps of it."""

    hybrid: Hybrid
    run_stage: RunStage
    steps: int

    def __call__(self, within: Training) -> Tuned:
        found = []
        for stage in stages(within.recipe.alignment.schedule, len(self.hybrid.parts), self.steps):
            name, step = f"trial stage {stage.number + 1}", partial(_curve, self.run_stage, stage, within)
            found.append(Curve.from_dict(within.journal.piece(name, step, self.hybrid.graph_module)))
        return Tuned(steps=sum(curve.steps for curve in found), curves=tuple(found))


@dataclass(frozen=True)
class _Tuning:
    """So many steps of it."""

    hybrid: Hybrid
    steps: int

    def __call__(self, within: Training) -> Tuned:
        return fine_tune(self.hybrid, within, self.steps, phase="trial")


def _curve(run_stage: RunStage, stage: Stage, within: Training) -> dict[str, Any]:
    return asdict(replace(run_stage(stage, within).curve, phase="trial"))


def _trial(
    hybrid: Hybrid, training: Training, run: Callable[[Training], Tuned], seconds: float
) -> tuple[Trial, dict[str, torch.Tensor] | None]:
    """What was found, and where it gained all weights at the end. The hybrid is left as it was."""
    graph_module = hybrid.graph_module
    start = {name: value.clone() for name, value in graph_module.state_dict().items()}
    before = training.judge.value(graph_module, training.judge.sample)
    begun = time.monotonic()
    tried = run(training.within(seconds))
    (took,) = ranks.agreed(time.monotonic() - begun)
    gain = before - training.judge.value(graph_module, training.judge.sample)
    gain = max(0.0, gain) if gain == gain else 0.0
    end = {name: value.clone() for name, value in graph_module.state_dict().items()} if gain else None
    graph_module.load_state_dict(start)
    graph_module.eval()
    stepping = None if tried.seconds is None else ranks.agreed(tried.seconds)[0]
    return Trial(gain=gain, seconds=max(took, 1e-6), steps=tried.steps, stepping=stepping, curves=tried.curves), end
