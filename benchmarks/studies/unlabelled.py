"""How many of a recipe's steps should go to alignment where there are no labels?

As `shares.py`, of six of its conversions, without a `loss=`: fine-tuning then matches the guide's outputs, which say
less of an example than the parts' exits do. A hundred steps and four hundred, of which the default takes its share by a
trial of either. Told is the divergence from the guide on held-out data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.studies.shares import CASE as SHARES
from benchmarks.studies.shares import FOUND, measure, table
from benchmarks.studies.starts import Conversion, of_digits, of_language_model
from benchmarks.suite import Case, Run


def without_loss(conversions: Iterator[Conversion]) -> Iterator[Conversion]:
    for name, model, told in conversions:
        yield name, model, {key: value for key, value in told.items() if key != "loss"}


def bench(run: Run) -> None:
    few, many = run.settings["budgets"]
    shares = run.settings["shares"]
    found = (many, FOUND)
    for seed in run.seeds:
        ways = [*itertools.product((few, many), shares), found]
        measure(run, without_loss(of_digits(run.settings, seed)), seed, ways)
    for seed in run.seeds:
        ways = [*itertools.product((few,), shares), (many, shares[0]), found]
        measure(run, without_loss(of_language_model(run.settings, seed, windowed=False)), seed, ways)


CASE = Case(
    question="How many of a recipe's steps should go to alignment where there are no labels?",
    minutes=65,
    unit="divergence",
    run=bench,
    settings={**SHARES.settings, "budgets": [100, 400]},
    quick={**SHARES.quick, "budgets": [2, 4]},
    quick_only=SHARES.quick_only,
    seeds=SHARES.seeds,
    needs=SHARES.needs,
    table=table,
    partial=True,
)
