"""What the language benchmarks share: the demo's guide and data, a recipe at a budget, one conversion as a row.

B batch, T time
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.suite import Result, Run
from examples.text import Windows, corpus, held_out_windows
from thesean.errors import LostError
from thesean.recipe import Recipe


def guide(layers: int | None = None) -> Any:
    """The demo's trained GPT-2; its first `layers` alone in quick forms."""
    from examples.demo_gpt2 import load_guide

    model = load_guide("committed")
    if layers is not None:
        model.transformer.h = model.transformer.h[:layers]
        model.config.n_layer = layers
    return model


def held_out(length: int, every: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One in `every` groups of held-out windows."""
    return held_out_windows(length)[::every]


def windows(settings: dict[str, Any], seed: int) -> Windows:
    """Training batches of settings' steps, batch and length; at least sixteen, which the closed form reads."""
    steps, batch, length = (settings[key] for key in ("steps", "batch", "length"))
    return Windows(corpus(held_out=False), batches=max(16, steps), batch=batch, length=length, seed=seed)


def recipe(base: str = "default", steps: int | None = None, **changes: Any) -> Recipe:
    """A named recipe at a budget of steps, which "fast" has none of; `section__field=value` changes one setting."""
    data = Recipe.named(base).model_dump()
    if steps is not None and base != "fast":
        data["steps"] = steps
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (data[section] if section else data)[name] = value
    return Recipe.model_validate(data)


def convert(
    model: nn.Module,
    settings: dict[str, Any],
    held_out: list[Any],
    seed: int,
    recipe: Recipe,
    target: Any = "linear-attention",
    granularity: Any = "sublayer",
    kind: Any = None,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """One conversion, or a baseline of this kind; nats per character, also after each stage, and seconds."""
    common: dict[str, Any] = dict(
        data=windows(settings, seed), eval_data=held_out, loss=thesean.cross_entropy, recipe=recipe, seed=seed,
        granularity=granularity, progress=False,
    )  # fmt: skip
    start = time.monotonic()
    try:
        if kind is None:
            converted = thesean.compile(model, target, **common)
        else:
            converted = thesean.baseline(model, target, kind=kind, learning_rate=learning_rate, **common)
    except LostError as error:  # what a setting loses is what is asked here
        converted = error.converted
    report = converted.report
    return {
        "loss": report.converted["loss"],
        "guide": report.guide["loss"],
        "stages": [row.loss for row in report.stages],
        "steps": report.steps,
        "seconds": round(time.monotonic() - start, 1),
        "params": report.params,
    }


def convert_all(run: Run, model: nn.Module, experiments: dict[str, dict[str, Any]]) -> list[Any]:
    """A row of each of the run's seeds for every name -> arguments of `convert`; gives the held-out windows."""
    settings = run.settings
    windows_held_out = held_out(settings["length"], settings["every"])
    for name, arguments in experiments.items():
        for seed in run.seeds:
            if run.wants(name, seed):
                run.add(name, seed, **convert(model, settings, windows_held_out, seed, **arguments))
    return windows_held_out


def table_of_seeds(result: Result, heading: str) -> str:
    """Median, lowest and highest loss of each row's seeds, in the order in which they ran."""
    budget, cases = result["settings"], result["cases"]
    size, seeds = f"{budget['batch']} x {budget['length']}", len({c["seed"] for c in cases})
    lines = [
        f"Guide {cases[0]['guide']:.3f} nats; steps of {size} characters (`fast`: none); median of {seeds} seeds.",
        "",
        f"| {heading} | loss | lowest | highest |",
        "|---|---:|---:|---:|",
    ]
    for name in dict.fromkeys(c["name"] for c in cases):
        losses = sorted(c["loss"] for c in cases if c["name"] == name)
        lines.append(f"| {name} | {losses[len(losses) // 2]:.3f} | {losses[0]:.3f} | {losses[-1]:.3f} |")
    return "\n".join(lines)
