"""The options that several commands share, and what they become."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from thesean.cli.words import (
    ArgumentError,
    load_data,
    load_object,
    parse_budget,
    parse_dynamic,
    parse_outputs,
    parse_target,
    parse_targets,
)
from thesean.recipe import Recipe


class Granularity(enum.StrEnum):
    block = "block"
    sublayer = "sublayer"
    finest = "finest"


class Flatten(enum.StrEnum):
    example = "example"
    token = "token"


class Stateful(enum.StrEnum):
    auto = "auto"
    yes = "yes"
    no = "no"


class Check(enum.StrEnum):
    all = "all"
    skip = "skip"


class FileDtype(enum.StrEnum):
    float32 = "float32"
    float16 = "float16"


class FileRuntime(enum.StrEnum):
    onnxruntime = "onnxruntime"
    genai = "genai"
    portable = "portable"


class LinearForm(enum.StrEnum):
    auto = "auto"
    fused = "fused"
    products = "products"


class QuantizedForm(enum.StrEnum):
    int8 = "int8"
    int8_static = "int8-static"
    int4 = "int4"


Guide = Annotated[
    str,
    typer.Argument(
        metavar="GUIDE",
        help="package.module:factory (called with no arguments; an nn.Module is taken as it is) or a local "
        "Hugging Face folder.",
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="[GLOB=]NAME[:key=value,...]",
        help="What replaces the parts (default: rnn). Repeat with GLOB= to choose per part; the name 'keep' keeps a "
        "part. See `thesean targets`.",
    ),
]
Quantize = Annotated[
    QuantizedForm | None,
    typer.Option(help="Weights of whole numbers, by onnxruntime's tools; the report compares them with exact ones."),
]
Data = Annotated[
    str | None, typer.Option(metavar="MODULE:FACTORY", help="Batches: a list, a DataLoader, anything re-iterable.")
]
ExampleInputs = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="A tuple or dict of inputs to trace with (default: the first batch, then the model's dummy_inputs).",
    ),
]
Keep = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Parts that stay as they are; repeatable.")]
Parts = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only these parts; repeatable.")]
Grain = Annotated[
    Granularity | None,
    typer.Option(
        help="Whole blocks (the default), the residual halves inside them (the default of auto), or every linear map."
    ),
]
Merge = Annotated[int | None, typer.Option(metavar="N", help="Every N neighbours become one part.")]
TargetParts = Annotated[
    int | None,
    typer.Option(metavar="N", help="Merge neighbours until N parts are left, those first that the outputs miss least."),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint",
        metavar="KEY=VALUE",
        help="With --target auto, the budget: latency_ms, speedup, params or flops; context, batch and kind say where "
        "latency is measured. Repeatable. speedup=1.25,1.5,2 makes a plan for each, from one probing.",
    ),
]
Choices = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate",
        metavar="NAME[:key=value,...]",
        help="With --target auto, what parts may become (default: keep, identity, rnn, conv, half of the heads, "
        "narrow at three widths). Repeatable.",
    ),
]
LossFunction = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="loss(output, batch) -> scalar (default: match the guide's outputs).",
    ),
]
InputsOf = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        metavar="MODULE:FUNCTION",
        help="inputs(batch) -> the guide's inputs, a dict by name or a tuple (default: guessed, and told).",
    ),
]
LabelsOf = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="MODULE:FUNCTION",
        help="labels(batch) -> the labels; loss and metric are then given (batch, labels).",
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs",
        metavar="NAME=KIND",
        help="How an output is compared with the guide's: softmax, sigmoid, mse or ignore (default: guessed, and "
        "told). Repeatable.",
    ),
]
FreeSizes = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        metavar="INPUT=DIM:NAME[,DIM:NAME...]",
        help="Which dimensions stay free, such as x=0:batch,1:time (default: guessed); 'none' fixes all. Repeatable.",
    ),
]
EvalData = Annotated[str | None, typer.Option(metavar="MODULE:FACTORY", help="Held-out batches.")]
RecipeName = Annotated[
    str, typer.Option(metavar="NAME|FILE.yaml", help="default, fast (closed form, seconds), paper, or your own.")
]
KeepBest = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, help="Parts that stay as they are: the N whose return helps most once all are replaced."
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Parts that raise the held-out loss (without --loss: the divergence from the guide) by more are tried "
        "once again, and then stay as they are.",
    ),
]
Retry = Annotated[
    str | None, typer.Option(metavar="NAME|FILE.yaml", help="The recipe that they are tried with once more.")
]
Recompute = Annotated[
    bool | None,
    typer.Option(
        "--activation-checkpointing",
        help="Compute activations anew in the backward: less memory, about 1.3 x the time.",
    ),
]
Sharded = Annotated[
    bool | None,
    typer.Option("--sharded", help="Of several processes each holds a slice of the weights while steps are taken."),
]
Accumulate = Annotated[
    int | None, typer.Option("--gradient-accumulation", metavar="N", min=1, help="Batches that make a step.")
]
TimeOrSteps = Annotated[
    str | None,
    typer.Option("--budget", metavar="60s|10min|2h|STEPS", help="Time for the whole run, or steps in all."),
]
Cache = Annotated[
    str,
    typer.Option(
        metavar="auto|off|DIR",
        help="Keep what the guide makes of batches that come again, or read it from DIR (`thesean activations`).",
    ),
]
Observers = Annotated[
    list[str] | None,
    typer.Option("--observe", metavar="tensorboard|trackio", help="Tell it every step of the run. Repeatable."),
]
Seed = Annotated[int, typer.Option(help="The same seed repeats the run.")]
Checked = Annotated[
    Check,
    typer.Option(
        "--check",
        help="all: no file unless every output was compared with torch's; skip: one all the same where torch's holds "
        "no finite number, which the file and what is printed tell.",
    ),
]
DumpGraphs = Annotated[
    Path | None,
    typer.Option("--dump-graphs", metavar="DIR", help="Write the graph after each pass there, as numbered text files."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def planning_arguments(
    target: list[str] | None,
    parts: list[str] | None,
    keep: list[str] | None,
    granularity: Granularity | None,
    merge: int | None,
    target_parts: int | None,
    constraint: list[str] | None,
    candidate: list[str] | None,
) -> dict[str, Any]:
    """The arguments that `thesean.plan` and `thesean.compile` share."""
    wanted = parse_targets(target or ["rnn"])
    automatic = wanted == "auto"
    if not automatic and (constraint or candidate):
        raise ArgumentError("--constraint and --candidate belong to --target auto.")
    return {
        "target": wanted,
        "parts": parts or None,
        "keep": tuple(keep or ()),
        "granularity": granularity.value if granularity is not None else None,
        "merge": merge,
        "target_parts": target_parts,
        "constraints": parse_budget(constraint or []),
        "candidates": [parse_target(word) for word in candidate] if candidate else None,
    }


def reading(outputs: list[str] | None, dynamic: list[str] | None) -> dict[str, Any]:
    """How the guide's inputs and outputs are read, as far as it is told; needs no guide yet."""
    told = {"outputs": parse_outputs(outputs or []), "dynamic": parse_dynamic(dynamic or [])}
    return {name: value for name, value in told.items() if value is not None}


def loaded_arguments(
    data: str | None,
    example_inputs: str | None,
    loss: str | None = None,
    eval_data: str | None = None,
    inputs: str | None = None,
    labels: str | None = None,
) -> dict[str, Any]:
    """The loaded data, example inputs, loss, held-out data and readers of batches, as far as they are given."""
    loaded: dict[str, Any] = {}
    if data is not None:
        loaded["data"] = load_data(data, "--data")
    if example_inputs is not None:
        loaded["example_inputs"] = load_object(example_inputs, "--example-inputs", call=True)
    functions = (
        ("loss", loss, "loss(output, batch)"),
        ("inputs", inputs, "inputs(batch)"),
        ("labels", labels, "labels(batch)"),
    )
    for name, word, form in functions:
        if word is not None:
            loaded[name] = load_object(word, f"--{name}", call=False)
            if not callable(loaded[name]):
                raise ArgumentError(f"--{name} {word!r}: expected a function {form}, found a value.")
    if eval_data is not None:
        loaded["eval_data"] = load_data(eval_data, "--eval-data")
    return loaded


def check_writable(option: str, path: Path | None) -> None:
    """Raises ArgumentError when the nearest folder that exists can't be written, before anything expensive starts."""
    if path is None:
        return
    is_folder = option in ("--out", "--dump-graphs")
    if is_folder and path.exists() and not path.is_dir():
        raise ArgumentError(f"{option} {path}: expected a folder, found a file. Choose another name.")
    if not is_folder and path.is_dir():
        suffix = {"--html": "report.html", "--json": "found.json", "--yaml": "plan.yaml"}.get(option, "model.onnx")
        raise ArgumentError(f"{option} {path}: expected a file name, found a folder. Add a name: {path / suffix}")
    nearest = path if path.is_dir() else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ArgumentError(f"{option} {path}: {nearest} is not a folder that you may write. Choose another.")


def numbered(path: Path, number: int) -> Path:
    """plan.yaml -> plan-1.yaml: one of several that are written."""
    return path.with_stem(f"{path.stem}-{number}")


def adjusted(recipe: str, **settings: Any) -> Recipe | str:
    """A recipe by name or file, with the settings that have an option of their own, if any was given. Raises
    RecipeError.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return Recipe.resolve({**Recipe.resolve(recipe).model_dump(), **given}) if given else recipe
