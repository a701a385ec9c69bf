"""What does the recipe `best` buy, which takes five times the steps of the default and reads four times the data first?

On the demo's language model, with two targets: one that starts near the guide and one that starts far from it. Every
row has the same batches to draw from, and loses nats per held-out character.
"""

from __future__ import annotations

from typing import Any

from benchmarks import language
from benchmarks.suite import Case, Result, Run
from thesean.recipe import Recipe

TARGETS = ("linear-attention", "gru")


def experiments(steps: int | None) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `language.convert`."""
    more = Recipe.named("best").closed_form.batches
    recipes = {
        "fast": language.recipe("fast"),
        f"fast, {more} batches": language.recipe("fast", closed_form__batches=more),
        "default": language.recipe("default", steps),
        "best": language.recipe("best", steps),
    }
    return {f"{target}, {name}": {"target": target, "recipe": r} for target in TARGETS for name, r in recipes.items()}


def bench(run: Run) -> None:
    language.convert_all(run, language.guide(run.settings["layers"]), experiments(run.settings["only_steps"]))


def table(result: Result) -> str:
    """Median and range of the seeds, and the rows that were not measured."""
    measured = {row["name"] for row in result["cases"]}
    left = dict.fromkeys(row["name"] for row in result["details"].get("left_out", ()))
    lines = [f"| {name} | not measured | | |" for name in left if name not in measured]
    return "\n".join([language.table_of_seeds(result, heading="recipe"), *lines])


CASE = Case(
    question="What does the recipe `best` buy with more steps and more data?",
    minutes=45,
    unit="nats a character",
    run=bench,
    seeds=(0, 1, 2),
    settings={
        "steps": Recipe.named("best").steps, "only_steps": None, "batch": 4, "length": 256, "every": 4, "layers": None,
    },
    quick={"steps": 2, "only_steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1},
    quick_only=("gru, fast, 64 batches", "gru, best"),
    needs=("transformers",),
    table=table,
    partial=True,
)  # fmt: skip
