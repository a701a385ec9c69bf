"""Which recipe and which cell are the defaults? Converts the demo's guide in many ways at an equal budget.

    python benchmarks/recipes.py --out benchmarks/results/recipes.json [--only NAME ...] [--seeds 0 1 2]

Every run takes the same number of optimizer steps on the same batches; the baselines' learning rates are tuned over the
same grid as the recipe's. Runs that the file holds already are skipped, so an interrupted run continues. Losses are
nats per held-out character, after the conversion and, for parts k = 1..n, of the hybrid right after its stage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch

import thesean
from text import Windows, corpus, held_out_windows
from thesean.recipe import Recipe
from thesean.report import environment

STEPS, BATCH, LENGTH = 300, 4, 256
GRID = (1e-3, 2e-3, 4e-3)


def recipe(base: str = "default", **changes: Any) -> Recipe:
    """A named recipe at this benchmark's budget; `section__field=value` changes one setting."""
    data = Recipe.named(base).model_dump()
    if base != "fast":
        data["steps"] = STEPS
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (data[section] if section else data)[name] = value
    return Recipe.model_validate(data)


def experiments() -> dict[str, dict[str, Any]]:
    """Name -> arguments of `run`."""
    runs: dict[str, dict[str, Any]] = {}
    for cell in ("linear-attention", "mingru", "gru", "lstm", "elman"):
        runs[f"cell {cell}"] = {"target": cell, "recipe": recipe()}
        runs[f"fast {cell}"] = {"target": cell, "recipe": recipe("fast")}
    runs["fast linear-attention, copied output kept"] = {"recipe": recipe("fast", closed_form__solve_copied=False)}
    plain = thesean.Target("linear-attention", memory=(90.0, 1100.0), sharpness=1.0)
    for base in ("default", "fast"):
        runs[f"{base} linear-attention, long memories, W = 1"] = {"target": plain, "recipe": recipe(base)}
    runs["paper"] = {"recipe": recipe("paper")}
    runs["paper, distilled"] = {"recipe": recipe("paper", fine_tuning__distillation=0.9)}
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


def run(
    model: torch.nn.Module,
    held_out: list[Any],
    seed: int,
    recipe: Recipe,
    target: Any = "linear-attention",
    granularity: Any = "sublayer",
    kind: Any = None,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """One conversion or baseline; JSON values."""
    data = Windows(corpus(held_out=False), batches=max(16, STEPS), batch=BATCH, length=LENGTH, seed=seed)
    common: dict[str, Any] = dict(
        data=data, eval_data=held_out, loss=thesean.cross_entropy, recipe=recipe, seed=seed,
        granularity=granularity, progress=False,
    )  # fmt: skip
    start = time.monotonic()
    if kind is None:
        converted = thesean.compile(model, target, **common)
    else:
        converted = thesean.baseline(model, target, kind=kind, learning_rate=learning_rate, **common)
    report = converted.report
    return {
        "loss": report.converted["loss"],
        "guide": report.guide["loss"],
        "stages": [row.loss for row in report.stages],
        "steps": report.steps,
        "seconds": round(time.monotonic() - start, 1),
        "params": report.params,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipes.json"))
    parser.add_argument("--only", nargs="*", help="names of experiments, or beginnings of names")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from transformers import GPT2LMHeadModel

    folder = Path(__file__).resolve().parents[1] / "examples" / "guide"
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = held_out_windows(LENGTH)[::2]  # every other group of windows: 80 of 160
    wanted = experiments()
    if options.only:
        wanted = {n: e for n, e in wanted.items() if n.startswith(tuple(options.only))}
    for name, arguments in wanted.items():
        for seed in options.seeds:
            done = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
            if any(r["name"] == name and r["seed"] == seed for r in done["runs"]):
                continue
            row = {"name": name, "seed": seed, **run(model, held_out, seed, **arguments)}
            done = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
            done["runs"].append(row)
            done["environment"] = environment()
            done["budget"] = {"steps": STEPS, "batch": BATCH, "length": LENGTH}
            options.out.write_text(json.dumps(done, indent=1) + "\n")
            stages = " ".join(f"{s:.3f}" for s in row["stages"] if s is not None)
            print(
                f"{name:48s} seed {seed}  loss {row['loss']:.4f}  after stages {stages}  {row['seconds']} s", flush=True
            )


if __name__ == "__main__":
    main()
