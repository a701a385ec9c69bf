"""How many of a recipe's steps should go to alignment where there are no labels?

As `shares.py`, of six of its conversions, without a `loss=`: fine-tuning then matches the guide's outputs, which say
less of an example than the parts' exits do. Digits at a hundred steps and at four hundred, the language model at a
hundred. Told is the divergence from the guide on held-out data.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.studies.shares import CASE as SHARES
from benchmarks.studies.shares import measure, table
from benchmarks.studies.starts import Conversion, of_digits, of_language_model
from benchmarks.suite import Case, Run


def without_loss(conversions: Iterator[Conversion]) -> Iterator[Conversion]:
    for name, model, told in conversions:
        yield name, model, {key: value for key, value in told.items() if key != "loss"}


def bench(run: Run) -> None:
    for seed in run.seeds:
        measure(run, without_loss(of_digits(run.settings, seed)), seed, run.settings["budgets"])
    for seed in run.seeds:
        texts = of_language_model(run.settings, seed, windowed=False)
        measure(run, without_loss(texts), seed, run.settings["budgets"][:1])


CASE = Case(
    question="How many of a recipe's steps should go to alignment where there are no labels?",
    minutes=40,
    unit="divergence",
    run=bench,
    settings={**SHARES.settings, "budgets": [100, 400]},
    quick=SHARES.quick,
    quick_only=SHARES.quick_only,
    seeds=SHARES.seeds,
    needs=SHARES.needs,
    table=table,
    partial=True,
)
