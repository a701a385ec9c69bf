"""From a bound plan to a trained hybrid: closed form, alignment by stages, refit, fine-tuning, and a record of each."""

from __future__ import annotations

from dataclasses import dataclass

from thesean.curve import Curve
from thesean.distill.aligning import Aligning
from thesean.distill.budget import Shares
from thesean.distill.evaluate import Evaluation
from thesean.distill.fine_tune import Tuned, fine_tune
from thesean.distill.gate import Gated
from thesean.distill.lost import lost_by
from thesean.distill.random_state import RandomState
from thesean.distill.sharded import whole
from thesean.distill.snapshot import Snapshot
from thesean.distill.training import Training
from thesean.passes.graph.surgery import unshare
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """What alignment leaves: the hybrid and its plan, in which parts may be the guide's again (see gate.py), a snapshot
    a part that was replaced, the guide's own figures, and the steps it took.
    """

    bound_plan: BoundPlan
    hybrid: Hybrid
    shares: Shares | None  # where trials told how
    snapshots: tuple[Snapshot, ...]
    guide: Evaluation
    steps: int
    curves: tuple[Curve, ...] = ()
    judged_on_some: bool = False  # whether snapshots were judged on fewer batches than all that are held out
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conversion:
    bound_plan: BoundPlan  # as executed
    hybrid: Hybrid
    snapshots: tuple[Snapshot, ...]  # one a part, in order
    guide: Evaluation
    final: Evaluation
    steps: int
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    lost: str = ""  # what to tell of one that is worse than nothing


def align(bound_plan: BoundPlan, hybrid: Hybrid, training: Training) -> Aligned:
    """Bring the hybrid's parts near the guide: initialise with its activations, solve, align stage by stage.

    A snapshot is taken after each part. Raises NumericalError for a guide that returns NaN, before anything else.
    """
    journal = training.journal
    journal.always = (RandomState(), training.feed.stream)
    journal.around = whole
    tried, guide = training.try_loss(), training.judge_guide()
    gated = training.recipe.max_drop is not None
    aligning = Gated(bound_plan, hybrid, training) if gated else Aligning(bound_plan, hybrid, training)
    journal.piece("align", aligning.run, aligning)
    results = aligning.results
    return Aligned(
        bound_plan=aligning.bound_plan,
        hybrid=aligning.hybrid,
        shares=aligning.shares,
        snapshots=tuple(aligning.snapshots),
        guide=guide,
        steps=sum(result.steps for result in results),
        curves=tuple(result.curve for result in results),
        judged_on_some=bool(aligning.judged_on),
        notes=(*tried, *aligning.notes, *([aligning.judged_on] if aligning.judged_on else [])),
    )


def tune(training: Training, aligned: Aligned) -> Conversion:
    """Fine-tune end to end with the steps that alignment left over: plateaus shift steps, they don't lose them."""
    hybrid = aligned.hybrid
    steps = training.recipe.steps - aligned.steps if training.recipe.fine_tuning.share > 0 else 0
    if (shares := aligned.shares) is not None:  # a number that a run which goes on is given again
        steps = training.journal.piece("tuning steps", lambda: shares.tuning_steps(training, aligned.steps))
    tuned, tried = Tuned(steps=0), () if shares is None or shares.tuning is None else shares.tuning.curves
    begun = None if shares is None else shares.tuned
    if begun is not None or steps > 0:
        unshare(hybrid.graph_module, training.guide)
    if begun is not None:
        hybrid.graph_module.load_state_dict(begun)
    if steps > 0:
        tuned = fine_tune(hybrid, training, steps, tried=tried, ends=training.trainer.deadline)
    hybrid.graph_module.eval()
    last = aligned.snapshots[-1].evaluation if aligned.snapshots and begun is None else None
    final = training.judge(hybrid.graph_module) if tuned.steps or last is None or aligned.judged_on_some else last
    on_the_way = {hybrid.parts[s.parts[-1]]: s.evaluation.divergence for s in aligned.snapshots}
    lost = lost_by(hybrid, training, final, aligned.guide, on_the_way)
    training.judge.forget()
    unshare(hybrid.graph_module, training.guide)  # whoever gets it may train it
    return Conversion(
        bound_plan=aligned.bound_plan,
        hybrid=hybrid,
        snapshots=aligned.snapshots,
        guide=aligned.guide,
        final=final,
        steps=aligned.steps + (0 if shares is None else shares.steps) + tuned.steps,
        notes=(*aligned.notes, *tuned.notes, *_ended(training, aligned, steps, tuned), *training.spared),
        curves=(*(() if shares is None else shares.curves), *aligned.curves, *tuned.curves),
        lost=lost,
    )


def _ended(training: Training, aligned: Aligned, steps: int, tuned: Tuned) -> list[str]:
    """Why each phase of a budget of time ended."""
    if aligned.shares is None or training.recipe.seconds is None:
        return []
    stages = {s.result.stage.number: s.result for s in aligned.snapshots if s.result is not None}
    asked, reasons = sum(r.stage.steps for r in stages.values()), {r.stopped_by for r in stages.values()}
    taken = sum(r.steps for r in stages.values())
    if taken >= asked:
        reasons = {"its share"}
    alignment = f"alignment ended after {taken} of {asked} steps: {', '.join(sorted(reasons))}"
    why = f", by a trial's pace {steps}: the time was up" if steps else ": no time was left"
    return [f"{alignment}; fine-tuning after {tuned.steps} steps{why}"]
