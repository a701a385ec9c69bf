"""What does it buy to judge a learning rate by the mean of its last steps' weights too?

The nine conversions of the study `rates`, each in closed form, and from there with the default recipe at many steps,
the rate found as it is, and by the network alone, as before. The same steps, data and seeds. Told is the loss on
held-out data, or without labels the divergence from the guide.
"""

from __future__ import annotations

from typing import Any

from benchmarks.studies import rates
from benchmarks.suite import Case, Result, Run

WAYS: dict[str, dict[str, Any]] = {"by itself": {"average_of": lambda steps: None}, "and by the mean": {}}


def bench(run: Run) -> None:
    rates.beside(run, WAYS)


def table(result: Result) -> str:
    return rates.table_of(result, list(WAYS))


CASE = Case(
    question="What does it buy to judge a learning rate by the mean of its last steps' weights too?",
    minutes=110,
    unit="nats of held-out data, or divergence",
    run=bench,
    settings={**rates.CASE.settings, "budgets": [300]},
    quick=rates.CASE.quick,
    quick_only=("digits convnet -> mlp",),
    seeds=(0, 1, 2),
    needs=("transformers", "sklearn"),
    table=table,
    partial=True,
)
