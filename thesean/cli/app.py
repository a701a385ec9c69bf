"""The command line: `thesean plan | convert | export`, and the commands of `look`. Errors are one line, exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import thesean
from thesean import ranks
from thesean.artifact import check_free
from thesean.cli.activations import activations
from thesean.cli.bench import bench
from thesean.cli.look import compare, inspect, measures, report, targets
from thesean.cli.options import (
    Accumulate,
    Budget,
    Cache,
    Check,
    Checked,
    Choices,
    Data,
    Debug,
    DumpGraphs,
    EvalData,
    ExampleInputs,
    FileDtype,
    FileRuntime,
    FreeSizes,
    Grain,
    Guide,
    InputsOf,
    Keep,
    KeepBest,
    LabelsOf,
    LinearForm,
    LossFunction,
    MaxDrop,
    Merge,
    Observers,
    Outputs,
    Parts,
    Quantize,
    RecipeName,
    Recompute,
    Retry,
    Seed,
    Sharded,
    Stateful,
    TargetParts,
    Targets,
    TimeOrSteps,
    adjusted,
    check_writable,
    loaded_arguments,
    numbered,
    planning_arguments,
    reading,
)
from thesean.cli.suite import NetworkOrSuite
from thesean.cli.telling import one_line_errors, steps_told
from thesean.cli.words import ArgumentError, load_guide, parse_sizes
from thesean.errors import ArtifactError
from thesean.passes.plan.svg import check_format
from thesean.workdir import keep as kept_or_told

app = typer.Typer(
    name="thesean",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # the examples keep their line ends, ready to copy
    pretty_exceptions_show_locals=False,  # locals are whole networks
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"thesean {thesean.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Change a trained network's architecture: transformer to RNN, convnet to MLP, verified ONNX at the end.

    \b
    Look at the plan first, then convert, then export:
      thesean plan models.gpt:make --target rnn
      thesean convert models.gpt:make --data texts:batches --out build/rnn
      thesean export build/rnn model.onnx
    """


@app.command()
def convert(
    guide: Guide,
    target: Targets = None,
    data: Data = None,
    loss: LossFunction = None,
    eval_data: EvalData = None,
    example_inputs: ExampleInputs = None,
    inputs: InputsOf = None,
    labels: LabelsOf = None,
    outputs: Outputs = None,
    dynamic: FreeSizes = None,
    parts: Parts = None,
    keep: Keep = None,
    granularity: Grain = None,
    merge: Merge = None,
    target_parts: TargetParts = None,
    constraint: Budget = None,
    candidate: Choices = None,
    recipe: RecipeName = "default",
    keep_best: KeepBest = None,
    max_drop: MaxDrop = None,
    retry: Retry = None,
    activation_checkpointing: Recompute = None,
    gradient_accumulation: Accumulate = None,
    sharded: Sharded = None,
    budget: TimeOrSteps = None,
    cache: Cache = "auto",
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Run this plan, made by `thesean plan --yaml` and edited.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Save the converted model here.")] = None,
    onnx: Annotated[Path | None, typer.Option(metavar="FILE", help="Export it here, verified in onnxruntime.")] = None,
    check: Checked = Check.all,
    quantize: Quantize = None,
    workdir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep checkpoints here, and the converted model: run again, it goes on."),
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|must|never", help="Go on with the run in --workdir, if it is the same.")
    ] = "auto",
    dump_graphs: DumpGraphs = None,
    observe: Observers = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    debug: Debug = False,
) -> None:
    """Convert GUIDE to another architecture, save it, export it.

    \b
    With your data and loss, where texts.py defines batches() and loss(output, batch):
      thesean convert models.gpt:make --data texts:batches \\
        --loss texts:loss --out build/rnn --onnx rnn.onnx

    \b
    A local Hugging Face folder, in closed form, without gradients:
      thesean convert ./gpt2 --data texts:batches --recipe fast --out build/fast

    \b
    The first block kept, two made recurrent, the last a wider GRU:
      thesean convert models.gpt:make --data texts:batches --out build/mixed \\
        -t 'transformer.h.0=keep' -t 'transformer.h.[12]=rnn' \\
        -t 'transformer.h.3=gru:width=256'

    \b
    1.5 times as fast at 512 tokens, chosen part by part:
      thesean convert models.gpt:make --data texts:batches --target auto \\
        --constraint speedup=1.5 --constraint context=512 --out build/auto

    \b
    Where a guess is wrong: what of a batch the guide reads, how outputs are compared, what has any size:
      thesean convert models.agent:make --data games:batches --inputs games:inputs \\
        --outputs policy=softmax --outputs value=mse --dynamic board=0:batch --out build/agent

    \b
    No part may cost more than 0.02 nats; one that does stays as it is:
      thesean convert models.gpt:make --data texts:batches --loss texts:loss --max-drop 0.02 --out build/rnn

    \b
    A plan that you edited:
      thesean plan models.gpt:make --yaml plan.yaml
      thesean convert models.gpt:make --plan plan.yaml --data texts:batches --out build/rnn

    \b
    A long run: after ctrl-C, a crash or a power cut the same command goes on where it was:
      thesean convert models.gpt:make --data texts:batches --workdir build/run

    \b
    In four processes, each with a quarter of every batch's rows, by torchrun or `accelerate launch`:
      torchrun --nproc-per-node 4 -m thesean convert models.gpt:make --data texts:batches --workdir build/run
    """
    with one_line_errors(debug):
        if out is None and onnx is None and workdir is None:
            raise ArgumentError("nothing to write: give --out DIR, --onnx FILE, --workdir DIR or several.")
        if onnx is None and check is not Check.all:
            raise ArgumentError("--check says how --onnx FILE is verified: give both, or leave it to `thesean export`.")
        chosen_twice = target or parts or keep or merge or target_parts or granularity or constraint
        if quantize is not None and onnx is None:
            raise ArgumentError("--quantize is how --onnx FILE is written: give both.")
        if plan is not None and chosen_twice:
            raise ArgumentError(
                "--plan already says what replaces which part: leave --target, --parts, --keep, --granularity, --merge "
                "and --target-parts out."
            )
        for option, path in (("--out", out), ("--onnx", onnx), ("--dump-graphs", dump_graphs)):
            check_writable(option, path)  # before the training, not after
        if out is not None:
            check_free(out)
        own = {"keep_best": keep_best, "max_drop": max_drop, "retry": retry}
        own |= {
            "activation_checkpointing": activation_checkpointing,
            "gradient_accumulation": gradient_accumulation,
            "sharded": sharded,
        }
        settings = adjusted(recipe, **own)
        shown = [not quiet, *observe] if observe else not quiet
        chosen: dict[str, Any] = {"recipe": settings, "seed": seed, "progress": shown}
        if plan is not None:
            chosen["plan"] = thesean.Plan.from_yaml(plan)
        else:
            chosen |= planning_arguments(target, parts, keep, granularity, merge, target_parts, constraint, candidate)
        chosen |= reading(outputs, dynamic)
        model = load_guide(guide)
        chosen |= loaded_arguments(data, example_inputs, loss, eval_data, inputs, labels)
        chosen |= {"workdir": workdir, "resume": resume}
        chosen["cache"] = cache
        chosen["budget"] = int(budget) if budget is not None and budget.isdecimal() else budget
        converted = thesean.compile(model, **chosen, dump_graphs=dump_graphs)
        if not ranks.leads():
            return  # the first rank has the same, and writes it
        if out is not None and (lost := kept_or_told(converted, out)):
            raise ArtifactError(lost)
        exported = None
        if onnx is not None:
            form: dict[str, Any] = {"check": check.value}
            if quantize is not None:
                form |= {"quantize": quantize.value, "data": chosen.get("data")}
            exported = converted.export(onnx, dump_graphs=dump_graphs, **form)
        if not quiet:
            typer.echo(str(converted.report))
            if exported is not None:
                typer.echo(str(exported))
            if out is not None:
                typer.echo(f"saved {out}: thesean.load({str(out)!r}), or `thesean export {out} model.onnx`")


@app.command()
def plan(
    guide: Guide,
    target: Targets = None,
    data: Data = None,
    loss: LossFunction = None,
    eval_data: EvalData = None,
    example_inputs: ExampleInputs = None,
    inputs: InputsOf = None,
    labels: LabelsOf = None,
    outputs: Outputs = None,
    dynamic: FreeSizes = None,
    parts: Parts = None,
    keep: Keep = None,
    granularity: Grain = None,
    merge: Merge = None,
    target_parts: TargetParts = None,
    constraint: Budget = None,
    candidate: Choices = None,
    recipe: RecipeName = "default",
    seed: Seed = 0,
    context: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="Time guide, untrained plan and ceiling in onnxruntime at these tokens."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="And at these batches (default: 1); alone, at the example's length."),
    ] = None,
    yaml: Annotated[Path | None, typer.Option("--yaml", metavar="FILE", help="Also write the plan, to edit.")] = None,
    draw: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw it, as .svg or .png.")] = None,
    dump_graphs: DumpGraphs = None,
    debug: Debug = False,
) -> None:
    """Print which part would become what, with parameters and FLOPs, and whether it pays. Nothing is trained.

    The ceiling is the guide without the replaced parts: no replacement of them can be faster. With --target auto
    candidates are probed first, for which --data, --loss, --eval-data, --recipe and --seed are there.

    \b
    Examples:
      thesean plan models.gpt:make --target rnn
      thesean plan ./gpt2 -t linear-attention --granularity sublayer --yaml plan.yaml

    \b
    Will it pay? At three contexts and two batches, about a minute:
      thesean plan models.gpt:make --target rnn --context 128,512,2048 --batch 1,8 \\
        --draw plan.svg

    \b
    Three budgets, one probing: plan-1.yaml, plan-2.yaml and plan-3.yaml.
      thesean plan models.gpt:make -t auto --data texts:batches \\
        --constraint speedup=1.25,1.5,2 --constraint context=512 --yaml plan.yaml
    """
    with one_line_errors(debug):
        check_writable("--yaml", yaml)
        check_writable("--draw", draw)
        check_writable("--dump-graphs", dump_graphs)
        if draw is not None:
            check_format(draw)
        measured: dict[str, Any] = {
            "context": parse_sizes(context, "--context"),
            "batch": parse_sizes(batch, "--batch"),
        }
        chosen = planning_arguments(target, parts, keep, granularity, merge, target_parts, constraint, candidate)
        chosen |= {"recipe": recipe, "seed": seed, **measured, **reading(outputs, dynamic)}
        chosen["dump_graphs"] = dump_graphs
        model = load_guide(guide)
        chosen |= loaded_arguments(data, example_inputs, loss, eval_data, inputs, labels)
        with steps_told():
            made = thesean.plan(model, **chosen)
        typer.echo(str(made))
        several = isinstance(made, thesean.Plans)
        for number, one in enumerate(made if several else [made], 1):
            if yaml is not None:
                path = numbered(yaml, number) if several else yaml
                one.to_yaml(path)
                typer.echo(f"wrote {path}: edit it, then `thesean convert {guide} --plan {path}`")
            if draw is not None:
                typer.echo(f"wrote {one.draw(numbered(draw, number) if several else draw)}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `thesean convert --out` saved.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="Takes its name once it is verified.")],
    stateful: Annotated[
        Stateful, typer.Option(help="State in and out, for step-by-step decoding; auto: where the model can.")
    ] = Stateful.auto,
    opset: Annotated[int | None, typer.Option(help="ONNX opset (default: the exporter's).")] = None,
    dtype: Annotated[FileDtype | None, typer.Option(help="The file's precision (default: float32).")] = None,
    external_data: Annotated[
        bool | None,
        typer.Option("--external-data/--no-external-data", help="Weights in a file beside it (default: past 2 GiB)."),
    ] = None,
    check: Checked = Check.all,
    quantize: Quantize = None,
    data: Data = None,
    runtime: Annotated[
        FileRuntime, typer.Option(help="genai: FILE is a folder; portable: operators of ONNX alone.")
    ] = FileRuntime.onnxruntime,
    operators: Annotated[
        LinearForm, typer.Option(help="Linear attention: onnxruntime's operator, products, or what is faster here.")
    ] = LinearForm.auto,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --runtime genai: its tokenizer is copied.")
    ] = None,
    dump_graphs: DumpGraphs = None,
    debug: Debug = False,
) -> None:
    """Export a saved conversion to verified ONNX.

    The file takes its name after onnxruntime agreed with torch at several batch sizes and lengths.

    \b
    Examples:
      thesean export build/rnn model.onnx
      thesean export build/rnn step.onnx --stateful yes --opset 22
      thesean export build/rnn small.onnx --quantize int8-static --data texts:batches
      thesean export build/rnn served --runtime genai --tokenizer ./gpt2
    """
    with one_line_errors(debug):
        if runtime is FileRuntime.onnxruntime:  # else it is a folder's name
            check_writable("FILE.onnx", file)
        check_writable("--dump-graphs", dump_graphs)
        chosen: Literal["auto"] | bool = "auto" if stateful is Stateful.auto else stateful is Stateful.yes
        if data is not None and quantize is None:
            raise ArgumentError("--data is what a quantised file is calibrated and judged on: give --quantize too.")
        converted = thesean.load(folder)
        wanted = None if dtype is None else getattr(torch, dtype)
        made = converted.export(
            file,
            stateful=chosen,
            opset=opset,
            dtype=wanted,
            dump_graphs=dump_graphs,
            external_data=external_data,
            check=check.value,
            quantize=None if quantize is None else quantize.value,
            runtime=runtime.value,
            operators=operators.value,
            tokenizer=tokenizer,
            **loaded_arguments(data, None),
        )
        typer.echo(str(made))


# the commands of other files are the same program's
for command in (activations, report, inspect, compare, targets, measures):
    app.command()(command)
app.command(cls=NetworkOrSuite)(bench)
