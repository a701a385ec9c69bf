"""`compile`: capture -> plan -> substitute -> align -> fine-tune, in that order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from thesean.artifact import check_free
from thesean.choose.constraints import Constraints, parse_constraints
from thesean.choose.plan import choose_plan
from thesean.converted import Converted
from thesean.distill.baselines import Kind, baseline_recipe, train_baseline
from thesean.distill.convert import Conversion, Snapshot, convert, with_state
from thesean.distill.data import integer_labels
from thesean.distill.evaluate import Evaluation, Judge, Loss, Metric, Task
from thesean.distill.feed import Feed, example_inputs_of, make_feed
from thesean.distill.observer import Observer
from thesean.distill.outputs import output_kind
from thesean.errors import DataError, PassRefused, PlanError
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture import Captured, capture
from thesean.passes.draft import TargetSpec, draft_from_plan, make_draft
from thesean.passes.drafter import Draft, added_params
from thesean.passes.partition import Granularity
from thesean.passes.plan import Plan
from thesean.passes.signature import output_wrapper
from thesean.recipe import Recipe
from thesean.report import make_observer
from thesean.report.conversion import ConversionReport, StageRow
from thesean.targets import Target


def compile(
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    eval_data: Iterable[Any] | None = None,
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
    progress: bool = True,
    plan: Plan | None = None,
) -> Converted:
    """Convert a trained network to another architecture.

    model: the guide, any module that torch.export takes; it is not modified.
    target: a family's name, a Target, or {part glob: name | Target | "keep"}.
    data: re-iterable of batches: tensor, tuple (x, y), or dict. Without it, parts are aligned on random inputs.
    example_inputs: tuple or dict; by default the first batch, then `model.dummy_inputs`.
    loss(output, batch) -> scalar; None: match the guide's outputs. metric(output, batch) -> float.
    eval_data: held-out batches for stopping and for the report; without it, some of a list's own are held out.
    parts, keep: globs over module paths. granularity: "block" (the default), "sublayer" for residual halves (the
    default of target "auto"), "finest" for every linear map. merge: that many neighbours become one part;
    target_parts: merge the most alike until so many are left.
    constraints: with target "auto", the budget that candidates are chosen for, part by part: {"latency_ms": 5.0,
    "context": 512}, {"speedup": 1.5}, {"params": ...}, {"flops": ...}; see `thesean.choose.constraints.Constraints`.
    recipe: "default", "fast" (closed form only), "paper", a Recipe, its settings as a dict, or a YAML path.
    workdir: a folder for plan.yaml, recipe.yaml and the saved conversion.
    plan: an edited plan; it takes the place of target, parts, keep and granularity.

    Raises CaptureError, PlanError, UnknownNameError, TargetMismatchError, DataError, NumericalError.
    """
    start = time.monotonic()
    settings = Recipe.resolve(recipe)
    observer = make_observer(progress)
    run = _set_up(
        model,
        _Given(data=data, example_inputs=example_inputs, loss=loss, metric=metric, eval_data=eval_data),
        _Wanted(
            target=target,
            parts=parts,
            keep=keep,
            granularity=granularity,
            merge=merge,
            target_parts=target_parts,
            constraints=constraints,
            candidates=candidates,
            plan=plan,
        ),
        settings,
        seed,
        observer,
    )
    folder = _prepare(workdir, run.draft.plan, run.recipe)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conversion = convert(
                run.draft,
                run.task,
                run.recipe,
                run.feed.batches.forever(),
                run.feed.batches.first(run.recipe.closed_form.batches),
                run.feed.held_out,
                observer,
            )
    finally:
        observer.close()
    converted = _finish(run, conversion, seed, start)
    if folder is not None:
        converted.save(folder / "converted")
    return converted


def baseline(
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    kind: Kind,
    learning_rate: float | None = None,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    eval_data: Iterable[Any] | None = None,
    parts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    granularity: Granularity | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    candidates: Sequence[str | Target] | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    plan: Plan | None = None,
) -> Converted:
    """What `compile` has to beat: the same architecture and steps without a single weight of the guide.

    kind: "scratch" trains on the task alone, "distillation" adds the guide's outputs, annealed as in the recipe.
    learning_rate: a baseline's best one is its own to tune; by default the recipe's. The rest as in `compile`.
    """
    start = time.monotonic()
    settings = baseline_recipe(kind, Recipe.resolve(recipe), learning_rate)
    observer = make_observer(progress)
    run = _set_up(
        model,
        _Given(data=data, example_inputs=example_inputs, loss=loss, metric=metric, eval_data=eval_data),
        _Wanted(
            target=target,
            parts=parts,
            keep=keep,
            granularity=granularity,
            merge=merge,
            target_parts=target_parts,
            constraints=constraints,
            candidates=candidates,
            plan=plan,
        ),
        settings,
        seed,
        observer,
    )
    guide = run.draft.captured.graph_module
    judge = Judge(guide, run.task, run.feed.held_out)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hybrid, steps = train_baseline(run.draft, run.task, settings, run.feed.batches.forever(), observer, kind)
    finally:
        observer.close()
    conversion = Conversion(
        hybrid=hybrid,
        snapshots=(),
        guide=judge(guide),
        final=judge(hybrid.graph_module),
        steps=steps,
    )
    return _finish(run, conversion, seed, start)


def plan(
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    eval_data: Iterable[Any] | None = None,
    parts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    granularity: Granularity | None = None,
    merge: int | None = None,
    target_parts: int | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    candidates: Sequence[str | Target] | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    context: int | Sequence[int] | None = None,
    batch: int | Sequence[int] | None = None,
) -> Plan:
    """What `compile` would replace, and what it costs. `print` it, edit it, hand it over, `draw` it.

    Nothing is trained, unless target is "auto": then the candidates are probed for a few steps each on `data`, and
    `recipe` says how a short tuning of the finalists goes. The other arguments are as in `compile`.

    context, batch: tokens and rows, one number or several. With either, guide, untrained plan and ceiling (the guide
    without the replaced parts) are timed in onnxruntime there, and the plan says in `notes` where a conversion can't
    pay; alone, `context` means one row and `batch` the example's length. It takes a minute, where planning takes a
    second. Progress goes to `logging`. Also raises PlanError for wrong numbers, MissingExtraError.
    """
    contexts, batches = sizes_of("context", context), sizes_of("batch", batch)
    wanted = _Wanted(
        target=target,
        parts=parts,
        keep=keep,
        granularity=granularity,
        merge=merge,
        target_parts=target_parts,
        constraints=constraints,
        candidates=candidates,
    )
    if not wanted.is_auto:
        draft = _draft(capture(model, example_inputs_of(model, data, example_inputs)), wanted)
        return _measured(draft, contexts, batches, seed)
    given = _Given(data=data, example_inputs=example_inputs, loss=loss, eval_data=eval_data)
    observer = make_observer(progress)
    try:
        chosen, captured, _, _ = _choose(model, given, wanted, Recipe.resolve(recipe), seed, observer)
    finally:
        observer.close()
    if not chosen.replaced or not (contexts or batches):
        return chosen
    return _measured(draft_from_plan(captured, chosen), contexts, batches, seed)


def sizes_of(name: str, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """One number or several as a tuple. Raises PlanError for anything but whole numbers of 1 or more."""
    if given is None:
        return ()
    numbers = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise PlanError(f"{name}: expected whole numbers of 1 or more, such as {name}=128, found {given!r}.")
    return numbers


def _measured(draft: Draft, contexts: Sequence[int], batches: Sequence[int], seed: int) -> Plan:
    if not (contexts or batches):
        return draft.plan
    from thesean.deploy.payoff import measure_plan

    return measure_plan(draft, contexts, batches or (1,), seed=seed)


@dataclass(frozen=True, kw_only=True)
class _Given:
    """The user's data and task."""

    data: Iterable[Any] | None
    example_inputs: Any
    loss: Loss | None = None
    metric: Metric | None = None
    eval_data: Iterable[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Which parts, and what they become."""

    target: TargetSpec
    parts: Sequence[str] | None
    keep: Sequence[str]
    granularity: Granularity | None
    merge: int | None
    target_parts: int | None
    constraints: Constraints | Mapping[str, Any] | None
    candidates: Sequence[str | Target] | None
    plan: Plan | None = None

    @property
    def is_auto(self) -> bool:
        return self.plan is None and self.target == "auto"


@dataclass(frozen=True, kw_only=True)
class _Run:
    draft: Draft
    task: Task
    recipe: Recipe
    feed: Feed
    notes: list[str]


def _set_up(model: nn.Module, given: _Given, wanted: _Wanted, settings: Recipe, seed: int, observer: Observer) -> _Run:
    """Everything before the conversion itself: cheap, so that a wrong argument fails at once, unless "auto" has to
    find a plan first.
    """
    notes: list[str] = []
    if wanted.is_auto:
        chosen, captured, feed, task = _choose(model, given, wanted, settings, seed, observer, notes)
        if not chosen.replaced:
            raise PlanError(f"the guide itself meets the constraints ({wanted.constraints}): nothing to convert.")
        draft = draft_from_plan(captured, chosen)
    else:
        captured = capture(model, example_inputs_of(model, given.data, given.example_inputs))
        draft = _draft(captured, wanted)
        feed, task = _feed_and_task(captured, given, seed, notes)
    return _Run(draft=draft, task=task, recipe=settings, feed=feed, notes=notes)


def _choose(
    model: nn.Module,
    given: _Given,
    wanted: _Wanted,
    settings: Recipe,
    seed: int,
    observer: Observer,
    notes: list[str] | None = None,
) -> tuple[Plan, Captured, Feed, Task]:
    """What target "auto" finds, and what it was found with."""
    bounds = parse_constraints(wanted.constraints)
    captured = capture(model, example_inputs_of(model, given.data, given.example_inputs))
    feed, task = _feed_and_task(captured, given, seed, notes if notes is not None else [])
    chosen = choose_plan(
        captured,
        bounds,
        wanted.candidates,
        parts=wanted.parts,
        keep=wanted.keep,
        granularity=wanted.granularity or "sublayer",
        merge=wanted.merge,
        target_parts=wanted.target_parts,
        task=task,
        feed=feed,
        recipe=settings,
        seed=seed,
        observer=observer,
    )
    return chosen, captured, feed, task


def _feed_and_task(captured: Captured, given: _Given, seed: int, notes: list[str]) -> tuple[Feed, Task]:
    feed = make_feed(captured, given.data, given.eval_data, given.example_inputs, seed, notes)
    task = Task(
        loss=given.loss,
        metric=given.metric,
        kind=output_kind(_guide_output(captured), integer_labels(feed.first)),
        wrap=output_wrapper(captured.signature.output_class),
    )
    return feed, task


def _draft(captured: Captured, wanted: _Wanted) -> Draft:
    if wanted.plan is not None:
        return draft_from_plan(captured, wanted.plan)
    if wanted.constraints is not None or wanted.candidates is not None:
        raise PlanError("constraints= and candidates= belong to target='auto', which chooses among candidates.")
    return make_draft(
        captured,
        wanted.target,
        keep=wanted.keep,
        granularity=wanted.granularity or "block",
        parts=wanted.parts,
        merge=wanted.merge,
        target_parts=wanted.target_parts,
    )


def _prepare(workdir: str | Path | None, plan: Plan, recipe: Recipe) -> Path | None:
    """Before anything trains: a folder that can't be written should not cost a conversion."""
    if workdir is None:
        return None
    folder = Path(workdir)
    check_free(folder / "converted")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan.to_yaml(folder / "plan.yaml")
        recipe.to_yaml(folder / "recipe.yaml")
    except OSError as error:
        raise DataError(f"workdir {folder} can't be written: {error.strerror or error}.") from error
    return folder


@torch.no_grad()
def _guide_output(captured: Captured) -> Any:
    return captured.graph_module(**captured.example)


def _bounded(graph_module: fx.GraphModule, recipe: Recipe, notes: list[str]) -> None:
    """Positions past the guide's table never read out of range."""
    try:
        result = BoundPositions(recipe.positions)(graph_module)
    except PassRefused as refusal:
        notes.append(str(refusal))
        return
    if result.modified:
        notes.append(f"positions past the guide's table: {recipe.positions}")


def _finish(run: _Run, conversion: Conversion, seed: int, start: float) -> Converted:
    hybrid, draft, recipe = conversion.hybrid, run.draft, run.recipe
    _bounded(hybrid.graph_module, recipe, run.notes)
    report = ConversionReport(
        guide=_figures(conversion.guide),
        converted=_figures(conversion.final),
        stages=_stage_rows(draft, conversion, recipe),
        steps=conversion.steps,
        seconds=time.monotonic() - start,
        params=sum(p.numel() for p in hybrid.graph_module.parameters()),
        flops=draft.plan.new_flops,
        train_length=run.feed.length,
        recipe=recipe.model_dump(),
        seed=seed,
        notes=tuple(run.notes),
        copied={r.facts.path: list(r.copied) for r in hybrid.replacements if r.copied},
    )
    signature = draft.captured.signature
    makers: list[Callable[[], Converted]] = [partial(_hybrid, draft, None, report, recipe)]
    makers += [partial(_hybrid, draft, s, report, recipe) for s in conversion.snapshots[:-1]]
    converted = Converted(hybrid.graph_module, signature, draft.plan, report)
    return Converted(hybrid.graph_module, signature, draft.plan, report, [*makers, lambda: converted])


def _hybrid(draft: Draft, snapshot: Snapshot | None, report: ConversionReport, recipe: Recipe) -> Converted:
    """The frontier's member after a stage, on demand."""
    count = snapshot.count if snapshot is not None else 0
    hybrid = with_state(draft, count, snapshot.state if snapshot is not None else {})
    _bounded(hybrid.graph_module, recipe, [])
    replaced = {p.path for p in draft.plan.replaced[:count]}
    rows = tuple(p if p.path in replaced else replace(p, target="keep", options={}, scope=None) for p in draft.plan)
    told = replace(
        report,
        converted=_figures(snapshot.evaluation) if snapshot is not None else report.guide,
        stages=report.stages[:count],
        params=sum(p.numel() for p in hybrid.graph_module.parameters()),
        flops=_flops_with(draft.plan, count),
    )
    return Converted(hybrid.graph_module, draft.captured.signature, replace(draft.plan, parts=rows), told)


def _flops_with(plan: Plan, count: int) -> int:
    return plan.flops + sum(p.new_flops - p.flops for p in plan.replaced[:count])


def _stage_rows(draft: Draft, conversion: Conversion, recipe: Recipe) -> tuple[StageRow, ...]:
    rows = []
    replaced = draft.plan.replaced
    seconds = 0.0
    for snapshot in conversion.snapshots:
        result = snapshot.result
        divergence = snapshot.evaluation.divergence
        rows.append(
            StageRow(
                part=conversion.hybrid.parts[snapshot.count - 1],
                replaced=snapshot.count,
                of=len(conversion.hybrid.parts),
                measure=recipe.alignment.measure if result else "closed form",
                before=result.before if result else None,
                after=result.after if result else divergence,
                loss=snapshot.evaluation.loss,
                metric=snapshot.evaluation.metric,
                divergence=divergence,
                steps=result.steps if result else 0,
                seconds=snapshot.seconds - seconds,
                stopped_by=result.stopped_by if result else "solved",
                params=draft.plan.params + sum(added_params(p) for p in replaced[: snapshot.count]),
                flops=_flops_with(draft.plan, snapshot.count),
            )
        )
        seconds = snapshot.seconds
    return tuple(rows)


def _figures(evaluation: Evaluation) -> dict[str, float | None]:
    return {"loss": evaluation.loss, "metric": evaluation.metric, "divergence": evaluation.divergence}
