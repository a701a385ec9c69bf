"""`compile`: capture -> plan -> substitute -> align -> fine-tune, in that order."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from thesean.artifact import check_free
from thesean.converted import Converted
from thesean.distill.baselines import Kind, baseline_recipe, train_baseline
from thesean.distill.convert import Conversion, Snapshot, convert, with_state
from thesean.distill.data import Batches, check_readable, example_of, integer_labels, synthetic
from thesean.distill.evaluate import Batch, Evaluation, Judge, Loss, Metric, Task
from thesean.distill.outputs import output_kind
from thesean.errors import DataError, PassRefused
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture import Captured, capture
from thesean.passes.draft import Draft, TargetSpec, draft_from_plan, make_draft
from thesean.passes.plan import Plan
from thesean.passes.signature import output_wrapper
from thesean.recipe import Recipe
from thesean.report import make_observer
from thesean.report.conversion import ConversionReport, StageRow

# Held-out batches that stages are judged by; a whole evaluation set would cost more than the stages
_STAGE_BATCHES = 4
_SYNTHETIC_BATCHES, _SYNTHETIC_SIZE, _SYNTHETIC_LENGTH = 16, 8, 64


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
    granularity: Literal["block", "sublayer"] = "block",
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
    parts, keep: globs over module paths. granularity: "block", or "sublayer" for residual halves.
    recipe: "default", "fast" (closed form only), "paper", a Recipe, its settings as a dict, or a YAML path.
    workdir: a folder for plan.yaml, recipe.yaml and the saved conversion.
    plan: an edited plan; it takes the place of target, parts, keep and granularity.

    Raises CaptureError, PlanError, UnknownNameError, TargetMismatchError, DataError, NumericalError.
    """
    start = time.monotonic()
    run = _set_up(
        model, target, data, example_inputs, loss, metric, eval_data, parts, keep, granularity, recipe, seed, plan
    )
    folder = _prepare(workdir, run.draft.plan, run.recipe)
    observer = make_observer(progress)
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
    granularity: Literal["block", "sublayer"] = "block",
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
    run = _set_up(
        model, target, data, example_inputs, loss, metric, eval_data, parts, keep, granularity, settings, seed, plan
    )
    observer = make_observer(progress)
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
    parts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    granularity: Literal["block", "sublayer"] = "block",
) -> Plan:
    """What `compile` would replace, and what it costs, without training anything. `print` it, edit it, hand it over."""
    captured = capture(model, _example(model, data, example_inputs))
    return make_draft(captured, target, keep=keep, granularity=granularity, parts=parts).plan


@dataclass(frozen=True, kw_only=True)
class _Run:
    draft: Draft
    task: Task
    recipe: Recipe
    feed: _Feed
    notes: list[str]


def _set_up(
    model: nn.Module,
    target: TargetSpec,
    data: Iterable[Any] | None,
    example_inputs: Any,
    loss: Loss | None,
    metric: Metric | None,
    eval_data: Iterable[Any] | None,
    parts: Sequence[str] | None,
    keep: Sequence[str],
    granularity: Literal["block", "sublayer"],
    recipe: Recipe | Mapping[str, Any] | str | Path | None,
    seed: int,
    plan: Plan | None,
) -> _Run:
    """Everything before the first gradient: cheap, so that a wrong argument fails at once."""
    settings = Recipe.resolve(recipe)
    captured = capture(model, _example(model, data, example_inputs))
    notes: list[str] = []
    draft = (
        draft_from_plan(captured, plan)
        if plan is not None
        else make_draft(captured, target, keep=keep, granularity=granularity, parts=parts)
    )
    feed = _feed(captured, data, eval_data, example_inputs, seed, notes)
    task = Task(
        loss=loss,
        metric=metric,
        kind=output_kind(_guide_output(captured), integer_labels(feed.first)),
        wrap=output_wrapper(captured.signature.output_class),
    )
    return _Run(draft=draft, task=task, recipe=settings, feed=feed, notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Feed:
    batches: Batches
    held_out: list[Batch]
    first: Any
    length: int | None


def _example(model: nn.Module, data: Iterable[Any] | None, example_inputs: Any) -> Any:
    if example_inputs is not None:
        return example_inputs
    if data is not None:
        check_readable(data)
        return example_of(next(iter(data)))
    return getattr(model, "dummy_inputs", None)


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


def _feed(
    captured: Captured,
    data: Iterable[Any] | None,
    eval_data: Iterable[Any] | None,
    example_inputs: Any,
    seed: int,
    notes: list[str],
) -> _Feed:
    signature = captured.signature
    device = next(iter(captured.example.values())).device
    if data is None:
        sizes = signature.check(captured.example)
        if example_inputs is None:  # a model's dummy inputs are too few to solve for anything
            sizes = {k: _SYNTHETIC_SIZE if k.startswith("batch") else _longest(captured) for k in sizes}
        shapes = ", ".join(f"{k} {v}" for k, v in sizes.items())
        told = (
            f"no data given: parts are aligned on synthetic inputs ({shapes}). The figures say nothing about real "
            "data; pass data=."
        )
        warnings.warn(told, UserWarning, stacklevel=4)
        notes.append(told)
        data = synthetic(signature, sizes, device, _SYNTHETIC_BATCHES, seed)
    held_source = eval_data
    synthesised = any("synthetic" in n for n in notes)
    if held_source is None and isinstance(data, (list, tuple)) and len(data) >= 8:
        count = min(_STAGE_BATCHES, len(data) // 8)
        data, held_source = data[:-count], data[-count:]
        if not synthesised:
            notes.append(f"no eval_data given: the last {count} batches of data were held out")
    batches = Batches(data, signature, device)
    if held_source is None:
        held_out = batches.first(_STAGE_BATCHES)
        notes.append("no eval_data given: measured on training batches")
    else:
        held_out = list(Batches(held_source, signature, device))
    first, inputs = batches.first(1)[0]
    length = signature.check(inputs).get("time")
    return _Feed(batches=batches, held_out=held_out, first=first, length=length)


def _longest(captured: Captured) -> int:
    """A useful synthetic length that the guide can still run: shorter than the default where its tables are."""
    length = _SYNTHETIC_LENGTH
    sizes = dict.fromkeys(captured.signature.symbols, 2)
    while length > 2:
        try:
            with torch.no_grad():
                sized = {k: length if not k.startswith("batch") else 2 for k in sizes}
                device = str(next(iter(captured.example.values())).device)
                captured.graph_module(**captured.signature.random_inputs(sized, device=device))
            return length
        except (IndexError, RuntimeError):
            length //= 2
    return length


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
                params=draft.plan.params + sum(p.new_params - p.params for p in replaced[: snapshot.count]),
                flops=_flops_with(draft.plan, snapshot.count),
            )
        )
        seconds = snapshot.seconds
    return tuple(rows)


def _figures(evaluation: Evaluation) -> dict[str, float | None]:
    return {"loss": evaluation.loss, "metric": evaluation.metric, "divergence": evaluation.divergence}
