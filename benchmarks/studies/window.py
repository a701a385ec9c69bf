"""What does a softmax window beside linear attention buy, and what does it cost? On the demo's language model.

Losses are nats per held-out character (a quarter of the held-out windows), in closed form alone and after 100 steps of
4 x 256 characters, which is the guide's context. "memories a to b": how many tokens past the window the heads remember
at the start; the defaults otherwise. "gentle": no alignment, learning rate 5e-4. The exported files are timed too.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import thesean
from benchmarks import language
from benchmarks.suite import Case, Result, Run
from thesean.deploy.timing.latency import latency_of_models

WINDOWS = (None, 16, 32, 64)
LONG, SHORT = (90.0, 1100.0), (1 / 3, 64.0)


def target(window: int | None, **options: Any) -> thesean.Target:
    if window is not None:
        options["window"] = window
    return thesean.Target("linear-attention", **options)


def called(window: int | None) -> str:
    return "no window" if window is None else f"window {window}"


def experiments(steps: int) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `language.convert`."""
    recipe = partial(language.recipe, steps=steps)
    runs: dict[str, dict[str, Any]] = {}
    for window in WINDOWS:
        runs[f"fast, {called(window)}"] = {"target": target(window), "recipe": recipe("fast")}
        runs[f"{steps} steps, {called(window)}"] = {"target": target(window), "recipe": recipe()}
    variants: dict[str, Any] = {
        "fast, no window, memories 90 to 1100, W = 2": target(None, memory=LONG, sharpness=2.0),
        "fast, window 16, memories 1/3 to 64": target(16, memory=SHORT),
        "fast, window 16, W = 1": target(16, sharpness=1.0),
        "fast, window 64, memories 1/3 to 64": target(64, memory=SHORT),
    }
    # where the closed form ends near the guide, the default rate first leads away from it
    gentle = recipe(alignment__share=0.0, alignment__schedule="none", fine_tuning__learning_rate=5e-4)
    for window in WINDOWS[1:]:
        runs[f"{steps} gentle steps, window {window}"] = {"target": target(window), "recipe": gentle}
    return runs | {name: {"target": chosen, "recipe": recipe("fast")} for name, chosen in variants.items()}


def latency(run: Run, model: torch.nn.Module, held_out: list[Any]) -> dict[str, Any]:
    """Milliseconds in onnxruntime of a prefill and of one more token, by window; weights in closed form."""
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        for window in run.settings["timed_windows"]:
            converted = thesean.compile(
                model, target(window), data=held_out[:1], recipe="fast", granularity="sublayer", progress=False,
                loss=thesean.cross_entropy,
            )  # fmt: skip
            paths[called(window)] = converted.export(Path(folder) / f"{window}.onnx").path
        found = latency_of_models(paths, converted.signature, contexts=run.settings["contexts"])
    return {name: asdict(figures) for name, figures in found.items()}


def bench(run: Run) -> None:
    model = language.guide(run.settings["layers"])
    held_out = language.convert_all(run, model, experiments(run.settings["steps"]))
    if "latency" not in run.details:
        run.keep(latency=latency(run, model, held_out))


def table(result: Result) -> str:
    """In the order in which they ran."""
    budget = result["settings"]
    size, guide = f"{budget['batch']} x {budget['length']}", result["cases"][0]["guide"]
    lines = [
        f"Steps of {size} characters (`fast`: none); the guide is at {guide:.3f} nats.",
        "",
        "| run | loss | after the first stage | after the last |",
        "|---|---:|---:|---:|",
    ]
    for row in result["cases"]:
        lines.append(f"| {row['name']} | {row['loss']:.3f} | {row['stages'][0]:.3f} | {row['stages'][-1]:.3f} |")
    return "\n".join(lines)


CASE = Case(
    question="What does a softmax window beside linear attention buy, and what does it cost?",
    minutes=10,
    unit="nats a character",
    run=bench,
    settings={
        "steps": 100, "batch": 4, "length": 256, "every": 4, "layers": None,
        "timed_windows": WINDOWS, "contexts": [64, 512],
    },
    quick={
        "steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1, "timed_windows": [16], "contexts": [8],
    },
    quick_only=("fast, window 16, W = 1",),
    needs=("onnxruntime", "transformers"),
    table=table,
)  # fmt: skip
