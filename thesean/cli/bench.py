"""`thesean bench`: what one's own networks lose and cost, side by side."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import thesean
from thesean.cli.made import Asked, Made, converted_now, read_saved
from thesean.cli.options import (
    Choices,
    Data,
    Debug,
    EvalData,
    ExampleInputs,
    FreeSizes,
    Grain,
    InputsOf,
    Keep,
    LabelsOf,
    LossFunction,
    Outputs,
    Parts,
    QuantizedForm,
    RecipeName,
    Seed,
    Targets,
    TimeOrSteps,
    check_writable,
    loaded_arguments,
    planning_arguments,
    reading,
)
from thesean.cli.suite import SUITE, run_suite
from thesean.cli.telling import one_line_errors, steps_told
from thesean.cli.words import NONE, ArgumentError, load_object, parse_sizes, parse_target
from thesean.converted import is_saved
from thesean.deploy.loaded import require
from thesean.report.trade_offs import TradeOffs
from thesean.workdir import keep as kept_or_told

_MODELS_ALONE = "is for converting, and {} is converted: give the model in its place"


def bench(
    context: typer.Context,
    network: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR|MODEL",
            help="A saved conversion, or a --workdir; or a model to convert now, as GUIDE of `thesean convert`.",
        ),
    ] = None,
    guide: Annotated[
        str | None, typer.Option(metavar="GUIDE", help="With DIR: what it was converted from, which it doesn't hold.")
    ] = None,
    data: Data = None,
    eval_data: EvalData = None,
    loss: LossFunction = None,
    metric: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="metric(output, batch) -> number.")
    ] = None,
    inputs: InputsOf = None,
    labels: LabelsOf = None,
    example_inputs: ExampleInputs = None,
    outputs: Outputs = None,
    dynamic: FreeSizes = None,
    lengths: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Tokens of a prefill, and after which one more is timed.")
    ] = "64,512,2048",
    batches: Annotated[str, typer.Option(metavar="N[,N...]", help="Rows.")] = "1,8",
    quantize: Annotated[
        str, typer.Option(metavar="FORM[,FORM...]", help="Beside exact files: int8, int8-static, int4; or none.")
    ] = "int8",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each latency, fewer where they take long.")] = 20,
    speedup: Annotated[
        list[float] | None,
        typer.Option(metavar="X", help="With MODEL: what --target auto finds at X times the speed. Repeatable."),
    ] = None,
    at: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of that prefill (default: the example's).")
    ] = None,
    candidate: Choices = None,
    target: Targets = None,
    parts: Parts = None,
    keep: Keep = None,
    granularity: Grain = None,
    recipe: RecipeName = "default",
    budget: TimeOrSteps = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write trade_offs.json, .svg and .png there, and what was converted."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: Debug = False,
) -> None:
    """Set quality against latency: the guide with its cache, every hybrid, conversions at several budgets.

    All are judged on the same held-out data (--eval-data, or some of --data) and served side by side in onnxruntime, on
    one thread. A star marks the Pareto front: nothing is as good and faster. MODEL is converted with --target, rnn by
    default; with --speedup and no --target, to those budgets alone.

    \b
    A saved conversion beside its guide, on held-out batches:
      thesean bench build/rnn --guide models.gpt:make --data texts:held_out

    \b
    A model: its hybrids on the way to rnn, and what fits two budgets at 512 tokens:
      thesean bench models.gpt:make --data texts:batches --target rnn \\
        --speedup 1.25 --speedup 1.5 --at 512 --out build/front

    \b
    Another first word is the name of a benchmark in a checkout; `python -m benchmarks --help` tells that program's
    options:
      thesean bench --list
      thesean bench latency --quick
    """
    if (words := context.meta.get(SUITE)) is not None:
        run_suite(words)
    with one_line_errors(debug):
        if network is None:
            raise ArgumentError("bench: expected the folder of a saved conversion or a model, found options alone.")
        check_writable("--out", out)
        require("onnx", "onnxruntime", "onnxscript")
        measured: dict[str, Any] = {
            "lengths": parse_sizes(lengths, "--lengths"),
            "batches": parse_sizes(batches, "--batches"),
            "quantize": _forms(quantize),
            "repeats": repeats,
        }
        asked = Asked(
            targets=target, speedups=tuple(speedup or ()), at=at, candidates=[*map(parse_target, candidate or ())]
        )
        planning = planning_arguments(target, parts, keep, granularity, None, None, None, None)
        told = loaded_arguments(data, example_inputs, loss, eval_data, inputs, labels)
        if metric is not None:
            told["metric"] = load_object(metric, "--metric", call=False)
        if is_saved(network):
            given = {"--target": target, "--speedup": speedup, "--parts": parts, "--keep": keep, "--budget": budget}
            given |= {"--granularity": granularity, "--example-inputs": example_inputs, "--dynamic": dynamic}
            if wrong := [name for name, value in given.items() if value]:
                raise ArgumentError(f"{wrong[0]} {_MODELS_ALONE.format(network)}.")
            made = read_saved(network, guide, told)
        elif guide is not None:
            raise ArgumentError(f"--guide: {network} is no saved conversion but a model itself. Leave it out.")
        else:
            run: dict[str, Any] = {"recipe": recipe, "seed": seed, "progress": not quiet, **reading(outputs, dynamic)}
            if budget is not None:
                run["budget"] = int(budget) if budget.isdecimal() else budget
            made = converted_now(network, asked, planning, {**run, **told})
        judged: dict[str, Any] = {name: told[name] for name in ("loss", "metric", "inputs", "labels") if name in told}
        if outputs:
            judged["outputs"] = reading(outputs, None)["outputs"]
        with steps_told():
            found = thesean.trade_offs(made.networks, guide=made.guide, data=made.held_out, **judged, **measured)
        found = found.with_notes(made.notes)
        typer.echo(str(found))
        if out is not None:
            _write(found, made, out)


def _forms(words: str) -> tuple[str | None, ...]:
    known = [form.value for form in QuantizedForm]
    forms = [word.strip() for word in words.split(",")]
    if forms == [NONE]:
        return (None,)
    if wrong := [form for form in forms if form not in known]:
        raise ArgumentError(f"--quantize {words!r}: expected {', '.join(known)}, or {NONE} alone; found {wrong[0]!r}.")
    return (None, *forms)


def _write(found: TradeOffs, made: Made, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    paths = [found.to_json(out / "trade_offs.json"), found.draw(out / "trade_offs.svg")]
    if find_spec("matplotlib") is not None:
        paths.append(found.draw(out / "trade_offs.png"))
    typer.echo(f"wrote {', '.join(map(str, paths))}")
    for name, converted in made.conversions.items():
        folder = out / name.replace(" ", "-")
        lost = kept_or_told(converted, folder)
        typer.echo(lost or f"saved {folder}")
