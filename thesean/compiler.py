"""`compile`: capture, plan, substitute, align, fine-tune, finish, in that order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

from torch import nn

from thesean import ranks
from thesean.bind_data import bind_data, told_of
from thesean.choose.choose import UNMET, UNTRIED
from thesean.choose.choose_plan import choose_plans
from thesean.choose.constraints import Budgets, Constraints
from thesean.choose.plans import Plans
from thesean.converted import Converted
from thesean.deploy.timing.plan import measure_plan
from thesean.distill.baselines import BaselineKind, baseline_recipe, train_baseline
from thesean.distill.keep_best import keep_best
from thesean.distill.misfit import naming_misfits
from thesean.distill.outputs import OutputKind
from thesean.distill.stages import align, tune
from thesean.distill.task import InputsOf, LabelsOf, Loss, Metric
from thesean.distill.training import Training
from thesean.errors import CaptureError, PlanError
from thesean.frontier import finish
from thesean.journal import KEEPS_NOTHING, Journal, Resume, journal_in, stoppable
from thesean.observer import Observer
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.unread import without_unread
from thesean.passes.graph.dump import dumping
from thesean.passes.graph.modes import callers_settings, seeded, usual_settings
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.divide import divide
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import TargetSpec, bind_plan, globs_of, plan_division
from thesean.passes.plan.partition import Granularity
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe
from thesean.rehearsed import rehearsed
from thesean.report import Watching, watched
from thesean.request import Request, sizes_of
from thesean.targets import Target
from thesean.warn import warn
from thesean.workdir import Workdir


def compile(
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    eval_data: Iterable[Any] | None = None,
    inputs: InputsOf | None = None,
    labels: LabelsOf | None = None,
    outputs: Mapping[str, OutputKind] | None = None,
    parts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    granularity: Granularity | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    candidates: Sequence[str | Target] | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    progress: Watching = True,
    plan: Plan | str | Path | None = None,
    dump_graphs: str | Path | None = None,
    resume: Resume = "auto",
    budget: int | str | None = None,
    cache: str | Path = "auto",
) -> Converted:
    """Convert a trained network to another architecture.

    model: the guide, any module that torch.export takes; it is not modified.
    target: a family's name, a Target, or {part glob: name | Target | "keep"}; "keep" alone is the guide itself,
    which is not trained then.
    data: re-iterable of batches: tensor, tuple (x, y), or dict. Without it, parts are aligned on random inputs.
    example_inputs: tuple or dict; by default the first batch, then `model.dummy_inputs`. dynamic: the dimensions that
    stay free and what they are, {"x": {0: "batch", 1: "time"}}, where the guess is wrong; {} fixes all.
    loss(output, batch) -> scalar; None: match the guide's outputs. metric(output, batch) -> float.
    eval_data: held-out batches for stopping and for the report; without it, some of a list's own are held out.
    inputs(batch): the guide's inputs in a batch, a dict by name or a tuple, where the guess (told in the report) is
    wrong. labels(batch): the labels in it; loss and metric are then given (batch, labels).
    outputs: how an output is compared, by name: {"logits": "softmax", "value": "mse", "scale": "ignore"}.
    parts, keep: globs over module paths. granularity: "block" (the default; by name, "rnn" takes all of a block),
    "sublayer" for residual halves (the default of target "auto"), "finest" for every linear map. merge: that many
    neighbours become one part; target_parts: merge those missed least until so many are left.
    constraints: with target "auto", the budget that candidates are chosen for, part by part: {"latency_ms": 5.0,
    "context": 512}, {"speedup": 1.5}, {"params": ...}, {"flops": ...}; see `thesean.choose.constraints.Constraints`.
    recipe: "default", "fast" (closed form only), "paper", a Recipe, its settings as a dict, or a YAML path.
    workdir: a folder for plan.yaml, recipe.yaml and the saved conversion, written together at the end, and until then
    for checkpoints: after an interruption the same call goes on. resume: "auto" begins anew, and says so, where guide,
    data, recipe or code are others by now; "must" raises ResumeError there; "never" begins anew.
    budget: "60s", "10min", "2h", or steps, in place of the recipe's: shared by what a trial of each phase gains.
    cache: "auto" keeps what the guide makes of batches that come again, up to 1 GiB, so that a step need not run it;
    "off" keeps nothing; a folder that `thesean activations` wrote is read, and "auto" beside. The bits are the same.
    progress: False is silent; "tensorboard", "trackio" or an observer of your own (`thesean.observer`) is told
    besides of every step, several as a list: [False, "tensorboard"].
    plan: an edited plan, or its YAML file; it takes the place of target, parts, keep and granularity.
    dump_graphs: a folder for the graph as text after each pass, numbered: 000-capture.txt, 001-split-layers.txt...

    Raises ArtifactError, WriteError, CaptureError, PlanError, UnknownNameError, TargetMismatchError, DataError,
    NumericalError, LostError.
    """
    start = time.monotonic()
    request = Request(
        target=target,
        plan=plan,
        data=data,
        example_inputs=example_inputs,
        dynamic=dynamic,
        loss=loss,
        metric=metric,
        eval_data=eval_data,
        inputs=inputs,
        labels=labels,
        outputs=outputs,
        parts=parts,
        keep=keep,
        granularity=granularity,
        merge=merge,
        target_parts=target_parts,
        constraints=constraints,
        candidates=candidates,
        recipe=recipe,
        seed=seed,
        resume=resume,
        budget=budget,
        cache=cache,
    )
    journal = journal_in(workdir)
    with ranks.joined(model):
        with usual_settings(), dumping(dump_graphs), watched(progress, journal.log) as observer, stoppable(journal):
            captured = traced(model, request)
            check_trainable(captured, request.settings)
            with naming_misfits(captured, request.sources, request.reading):
                bound_plan, training = planned(captured, request, observer, journal)
                run = None
                if workdir is not None:
                    run = ranks.first(lambda: Workdir.prepare(workdir, bound_plan.plan, request.settings))
                with seeded(seed):
                    hybrid = build_hybrid(bound_plan, share=True)
                    notes = rehearsed(bound_plan, hybrid, run)
                    aligned = align(bound_plan, hybrid, training)
                    conversion = tune(training, aligned)
            converted = finish(training, conversion, start, notes)
        if run is not None:
            warn(filter(None, [ranks.first(partial(run.keep, converted))]))
    return converted


def baseline(
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    kind: BaselineKind,
    learning_rate: float | None = None,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    eval_data: Iterable[Any] | None = None,
    inputs: InputsOf | None = None,
    labels: LabelsOf | None = None,
    outputs: Mapping[str, OutputKind] | None = None,
    parts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    granularity: Granularity | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    candidates: Sequence[str | Target] | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
    progress: Watching = True,
    plan: Plan | str | Path | None = None,
) -> Converted:
    """What `compile` has to beat: the same architecture and steps without a single weight of the guide.

    kind: "scratch" trains on the task alone, "distillation" adds the guide's outputs, annealed as in the recipe.
    learning_rate: a baseline's best one is its own to tune; by default the recipe's. The rest as in `compile`.
    """
    start = time.monotonic()
    request = Request(
        target=target,
        plan=plan,
        data=data,
        example_inputs=example_inputs,
        dynamic=dynamic,
        loss=loss,
        metric=metric,
        eval_data=eval_data,
        inputs=inputs,
        labels=labels,
        outputs=outputs,
        parts=parts,
        keep=keep,
        granularity=granularity,
        merge=merge,
        target_parts=target_parts,
        constraints=constraints,
        candidates=candidates,
        recipe=baseline_recipe(kind, Recipe.resolve(recipe), learning_rate),
        seed=seed,
        from_guide=False,
    )
    with ranks.joined(model), usual_settings(), watched(progress) as observer:
        captured = traced(model, request)
        check_trainable(captured, request.settings)
        with naming_misfits(captured, request.sources, request.reading):
            bound_plan, training = planned(captured, request, observer)
            with seeded(seed):
                conversion = train_baseline(bound_plan, training, kind)
        return finish(training, conversion, start)


@overload
def plan(model: nn.Module, target: TargetSpec = "rnn", *, constraints: Budgets, **rest: Any) -> Plans: ...
@overload
def plan(
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    example_inputs: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    eval_data: Iterable[Any] | None = None,
    inputs: InputsOf | None = None,
    labels: LabelsOf | None = None,
    outputs: Mapping[str, OutputKind] | None = None,
    parts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    granularity: Granularity | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    candidates: Sequence[str | Target] | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
    progress: Watching = True,
    context: int | Sequence[int] | None = None,
    batch: int | Sequence[int] | None = None,
    dump_graphs: str | Path | None = None,
) -> Plan: ...
def plan(  # type: ignore[misc]  # the first takes the others' arguments by `rest`
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    example_inputs: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    eval_data: Iterable[Any] | None = None,
    inputs: InputsOf | None = None,
    labels: LabelsOf | None = None,
    outputs: Mapping[str, OutputKind] | None = None,
    parts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    granularity: Granularity | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
    constraints: Constraints | Mapping[str, Any] | Budgets | None = None,
    candidates: Sequence[str | Target] | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
    progress: Watching = True,
    context: int | Sequence[int] | None = None,
    batch: int | Sequence[int] | None = None,
    dump_graphs: str | Path | None = None,
) -> Plan | Plans:
    """What `compile` would replace, and what it costs. `print` it, edit it, hand it over, `draw` it.

    Nothing is trained, unless target is "auto": then the candidates are probed for a few steps each on `data`, and
    `recipe` says how a short tuning of the finalists goes. Of several constraints=[{"speedup": 1.5}, {"speedup": 2}],
    from one probing, there is a plan for each, in a `Plans`. The other arguments are as in `compile`.

    context, batch: tokens and rows, one number or several. With either, guide, untrained plan and ceiling (the guide
    without the replaced parts) are timed in onnxruntime there, and the plan says in `notes` where a conversion can't
    pay; alone, `context` means one row and `batch` the example's length. It takes a minute, where planning takes a
    second. Progress goes to `logging`. Also raises PlanError for wrong numbers, MissingExtraError.
    """
    contexts, batches = sizes_of("context", context), sizes_of("batch", batch)
    request = Request(
        target=target,
        data=data,
        example_inputs=example_inputs,
        dynamic=dynamic,
        loss=loss,
        eval_data=eval_data,
        inputs=inputs,
        labels=labels,
        outputs=outputs,
        parts=parts,
        keep=keep,
        granularity=granularity,
        merge=merge,
        target_parts=target_parts,
        constraints=constraints,
        candidates=candidates,
        recipe=recipe,
        seed=seed,
        several=True,
    )
    with usual_settings(), dumping(dump_graphs):
        captured = traced(model, request)

        def told(bound_plan: BoundPlan) -> Plan:
            if notes := told_of(captured):
                noted = replace(bound_plan.plan, notes=(*bound_plan.plan.notes, *notes))
                bound_plan = replace(bound_plan, plan=noted)
            if not (contexts or batches):
                return bound_plan.plan
            return measure_plan(bound_plan, contexts, batches or (1,), seed=seed)

        if not request.is_auto:
            return told(divided(captured, request))
        with watched(progress) as observer, naming_misfits(captured, request.sources, request.reading):
            found, _ = chosen_plans(captured, request, observer)
        timing = bool(contexts or batches)
        found = [told(bind_plan(captured, p)) if p.replaced and timing else p for p in found]
        return found[0] if isinstance(request.constraints, Constraints) else Plans(found, request.budgets)


def traced(model: nn.Module, request: Request) -> Captured:
    """The guide's graph. Its own code runs as the caller had it."""
    with callers_settings():
        captured = capture(model, request.example(model), request.dynamic)
    return without_unread(captured, model) if request.guesses_inputs else captured


def divided(captured: Captured, request: Request) -> BoundPlan:
    """The plan that a target, or one by glob, makes of the guide's parts."""
    return plan_division(divide(captured, globs_of(request.target), **request.division), request.target)


def planned(
    captured: Captured, request: Request, observer: Observer, journal: Journal = KEEPS_NOTHING
) -> tuple[BoundPlan, Training]:
    """What becomes what, and what it is trained on and for. Cheap, so that a wrong argument fails at once, unless
    "auto" has to find a plan first.
    """
    if request.is_auto:
        (chosen,), training = chosen_plans(captured, request, observer, journal)
        unmet = [note for note in chosen.notes if note.startswith(UNMET)]
        if not chosen.replaced and unmet:
            why = "; ".join([*unmet, *(note for note in chosen.notes if note.startswith(UNTRIED))])
            raise PlanError(
                f"{why.removeprefix('warning: ')}. That is the guide: ask for less, or name other candidates."
            )
        if not chosen.replaced:
            raise PlanError(f"the guide itself meets the constraints ({request.budgets[0]}): nothing to convert.")
        warn(unmet)
        return bind_plan(captured, chosen), training
    if request.edited is not None:
        bound_plan = bind_plan(captured, request.edited)
    else:
        bound_plan = divided(captured, request)
    training = bind_data(captured, request, observer, journal)
    return keep_best(bound_plan, training), training


def chosen_plans(
    captured: Captured, request: Request, observer: Observer, journal: Journal = KEEPS_NOTHING
) -> tuple[list[Plan], Training]:
    """What target "auto" finds, a plan a budget, and what they were found with."""
    division = divide(captured, **request.division)
    training = bind_data(captured, request, observer, journal)
    if len(request.budgets) > 1:
        return choose_plans(division, request.budgets, request.candidates, training), training

    probing = training if ranks.count() == 1 else replace(training, feed=replace(training.feed))  # by whole batches

    def found() -> str:  # as text, so that a plan that was found before an interruption needn't be found again
        return choose_plans(division, request.budgets, request.candidates, probing)[0].to_yaml()

    return [Plan.from_yaml(journal.piece("plan", lambda: ranks.first(found)))], training


def check_trainable(captured: Captured, recipe: Recipe) -> None:
    """Raises CaptureError where steps of gradients would not train what they would in the guide."""
    if captured.untrainable and recipe.gradients:
        raise CaptureError(captured.untrainable)
