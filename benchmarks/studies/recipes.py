"""Which recipe and which cell are the defaults? Converts the demo's guide in many ways at an equal budget.

Every run takes the same number of optimizer steps on the same batches; the baselines' learning rates are tuned over the
same grid as the recipe's. Losses are nats per held-out character, after the conversion and, for parts k = 1..n, of the
hybrid right after its stage.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from functools import partial
from typing import Any

import thesean
from benchmarks import language
from benchmarks.suite import Case, Result, Run

GRID = (1e-3, 2e-3, 4e-3)
REPEATED = ("cell linear-attention", "schedule joint")  # with every seed, to know what seeds differ by


def experiments(steps: int) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `language.convert`."""
    recipe = partial(language.recipe, steps=steps)
    runs: dict[str, dict[str, Any]] = {}
    for cell in ("linear-attention", "mingru", "gru", "lstm", "elman"):
        runs[f"cell {cell}"] = {"target": cell, "recipe": recipe()}
        runs[f"fast {cell}"] = {"target": cell, "recipe": recipe("fast")}
    runs["fast linear-attention, copied output kept"] = {"recipe": recipe("fast", closed_form__solve_copied=False)}
    plain = thesean.Target("linear-attention", memory=(90.0, 1100.0), sharpness=1.0)
    for base in ("default", "fast"):
        runs[f"{base} linear-attention, long memories, W = 1"] = {"target": plain, "recipe": recipe(base)}
    paper = partial(recipe, "paper", alignment__samples="tokens")  # batches are of 4 rows
    runs["paper"] = {"recipe": paper()}
    runs["paper, distilled"] = {"recipe": paper(fine_tuning__distillation=0.9)}
    runs["no alignment"] = {"recipe": recipe(alignment__share=0.0, alignment__schedule="none")}
    for schedule in ("joint", "progressive", "sequential"):
        runs[f"schedule {schedule}"] = {"recipe": recipe(alignment__schedule=schedule)}
    for measure in ("cka", "mse", "cosine"):
        runs[f"measure {measure}, progressive"] = {
            "recipe": recipe(alignment__schedule="progressive", alignment__measure=measure)
        }
    runs["alignment 25%"] = {"recipe": recipe(alignment__share=0.25)}
    runs["copied output solved"] = {"recipe": recipe(closed_form__solve_copied=True)}
    runs["no hidden states"] = {"recipe": recipe(fine_tuning__hidden=0.0)}
    runs["no distillation"] = {"recipe": recipe(fine_tuning__distillation=0.0, fine_tuning__hidden=0.0)}
    runs["distillation not annealed"] = {"recipe": recipe(fine_tuning__anneal_until=1.0)}
    for rate in GRID:
        runs[f"learning rate {rate:g}"] = {"recipe": recipe(fine_tuning__learning_rate=rate)}
    for cell in ("linear-attention", "gru", "elman"):
        for kind in ("scratch", "distillation"):
            for rate in GRID:
                runs[f"{kind} {cell}, learning rate {rate:g}"] = {
                    "target": cell, "recipe": recipe(), "kind": kind, "learning_rate": rate,
                }  # fmt: skip
    whole = thesean.Target("gru", scope="part")
    runs["whole blocks to gru"] = {"target": whole, "recipe": recipe(), "granularity": "block"}
    return runs


def bench(run: Run) -> None:
    settings = run.settings
    model, held_out = language.guide(settings["layers"]), language.held_out(settings["length"], settings["every"])
    for name, arguments in experiments(settings["steps"]).items():
        for seed in run.seeds if name in REPEATED else run.seeds[:1]:
            if run.wants(name, seed):
                run.add(name, seed, **language.convert(model, settings, held_out, seed, **arguments))


def table(result: Result) -> str:
    """Best first: mean loss over seeds with its range, the hybrids' losses after the first and last stage, seconds."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in result["cases"]:
        runs[run["name"]].append(run)
    budget = result["settings"]
    size = f"{budget['steps']} steps of {budget['batch']} x {budget['length']}"
    guide = result["cases"][0]["guide"]
    lines = [
        f"{size} characters (`fast`: none); the guide is at {guide:.3f} nats, a uniform guess at 4.56.",
        "",
        "| run | seeds | loss | after the first stage | after the last | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in sorted(runs.items(), key=lambda item: _mean(item[1], "loss")):
        losses = [r["loss"] for r in rows]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(rows) > 1 else ""
        first, last = (_stage(rows, at) for at in (0, -1))
        seconds = round(_mean(rows, "seconds"))
        lines.append(f"| {name} | {len(rows)} | {_mean(rows, 'loss'):.3f}{spread} | {first} | {last} | {seconds} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(r[key] for r in rows)


def _stage(rows: list[dict[str, Any]], at: int) -> str:
    found = [r["stages"][at] for r in rows if r["stages"]]
    return f"{statistics.fmean(found):.3f}" if found else ""


CASE = Case(
    question="Which recipe and which cell are the defaults, at an equal budget?",
    minutes=90,
    unit="nats a character",
    run=bench,
    settings={"steps": 300, "batch": 4, "length": 256, "every": 2, "layers": None},
    quick={"steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1},
    quick_only=("fast mingru", "scratch gru, learning rate 0.001"),
    seeds=(0, 1, 2),
    needs=("transformers",),
    table=table,
)
