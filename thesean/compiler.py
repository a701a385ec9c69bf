"""`compile`: capture -> plan -> substitute -> align -> fine-tune, in that order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thesean.artifact import check_free
from thesean.choose.constraints import Constraints
from thesean.converted import Converted
from thesean.distill.baselines import BaselineKind, baseline_recipe, train_baseline
from thesean.distill.data import example_inputs_of
from thesean.distill.evaluate import Judge
from thesean.distill.stages import Conversion, convert
from thesean.distill.task import Loss, Metric
from thesean.errors import DataError, PlanError
from thesean.frontier import finish
from thesean.passes.capture.capture import capture
from thesean.passes.graph.dump import dumping
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.make_plan import TargetSpec, bind_plan
from thesean.passes.plan.partition import Granularity
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe
from thesean.report import make_observer
from thesean.request import Given, Wanted, choose_for, draft_for, set_up
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
    plan: Plan | str | Path | None = None,
    dump_graphs: str | Path | None = None,
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
    plan: an edited plan, or its YAML file; it takes the place of target, parts, keep and granularity.
    dump_graphs: a folder for the graph as text after each pass, numbered: 000-capture.txt, 001-split-layers.txt...

    Raises ArtifactError, CaptureError, PlanError, UnknownNameError, TargetMismatchError, DataError, NumericalError.
    """
    start = time.monotonic()
    settings = Recipe.resolve(recipe)
    observer = make_observer(progress)
    with dumping(dump_graphs):
        run = set_up(
            model,
            Given(data=data, example_inputs=example_inputs, loss=loss, metric=metric, eval_data=eval_data),
            Wanted(
                target=target,
                parts=parts,
                keep=keep,
                granularity=granularity,
                merge=merge,
                target_parts=target_parts,
                constraints=constraints,
                candidates=candidates,
                plan=Plan.from_yaml(plan) if isinstance(plan, (str, Path)) else plan,
            ),
            settings,
            seed,
            observer,
        )
        folder = _prepare(workdir, run.bound_plan.plan, run.recipe)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                conversion = convert(
                    run.bound_plan,
                    run.task,
                    run.recipe,
                    run.feed.batches.forever(),
                    run.feed.batches.first(run.recipe.closed_form.batches),
                    run.feed.held_out,
                    observer,
                )
        finally:
            observer.close()
        converted = finish(run, conversion, seed, start)
    if folder is not None:
        converted.save(folder / "converted")
    return converted


def baseline(
    model: nn.Module,
    target: TargetSpec = "rnn",
    *,
    kind: BaselineKind,
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
    plan: Plan | str | Path | None = None,
) -> Converted:
    """What `compile` has to beat: the same architecture and steps without a single weight of the guide.

    kind: "scratch" trains on the task alone, "distillation" adds the guide's outputs, annealed as in the recipe.
    learning_rate: a baseline's best one is its own to tune; by default the recipe's. The rest as in `compile`.
    """
    start = time.monotonic()
    settings = baseline_recipe(kind, Recipe.resolve(recipe), learning_rate)
    observer = make_observer(progress)
    run = set_up(
        model,
        Given(data=data, example_inputs=example_inputs, loss=loss, metric=metric, eval_data=eval_data),
        Wanted(
            target=target,
            parts=parts,
            keep=keep,
            granularity=granularity,
            merge=merge,
            target_parts=target_parts,
            constraints=constraints,
            candidates=candidates,
            plan=Plan.from_yaml(plan) if isinstance(plan, (str, Path)) else plan,
        ),
        settings,
        seed,
        observer,
    )
    guide = run.bound_plan.captured.graph_module
    judge = Judge(guide, run.task, run.feed.held_out)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hybrid, steps = train_baseline(
                run.bound_plan, run.task, settings, run.feed.batches.forever(), observer, kind
            )
    finally:
        observer.close()
    conversion = Conversion(
        hybrid=hybrid,
        snapshots=(),
        guide=judge(guide),
        final=judge(hybrid.graph_module),
        steps=steps,
    )
    return finish(run, conversion, seed, start)


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
    wanted = Wanted(
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
        bound_plan = draft_for(capture(model, example_inputs_of(model, data, example_inputs)), wanted)
        return _measured(bound_plan, contexts, batches, seed)
    given = Given(data=data, example_inputs=example_inputs, loss=loss, eval_data=eval_data)
    observer = make_observer(progress)
    try:
        chosen, captured, _, _ = choose_for(model, given, wanted, Recipe.resolve(recipe), seed, observer)
    finally:
        observer.close()
    if not chosen.replaced or not (contexts or batches):
        return chosen
    return _measured(bind_plan(captured, chosen), contexts, batches, seed)


def sizes_of(name: str, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """One number or several as a tuple. Raises PlanError for anything but whole numbers of 1 or more."""
    if given is None:
        return ()
    numbers = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise PlanError(f"{name}: expected whole numbers of 1 or more, such as {name}=128, found {given!r}.")
    return numbers


def _measured(bound_plan: BoundPlan, contexts: Sequence[int], batches: Sequence[int], seed: int) -> Plan:
    if not (contexts or batches):
        return bound_plan.plan
    from thesean.deploy.timing.plan import measure_plan

    return measure_plan(bound_plan, contexts, batches or (1,), seed=seed)


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
