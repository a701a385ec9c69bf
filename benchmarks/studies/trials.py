"""Does a short trial tell whether alignment or fine-tuning brings a conversion further?

Six of the conversions of `shares`, with a `loss=` and without one. From the closed form each takes 10, 20 and 40 steps,
all of alignment or all of fine-tuning; what a hundred steps come to at which share is in `shares` and `unlabelled`. A
budget of time goes by such a trial. The same data and seeds. Told is the loss on held-out data, or without labels the
divergence from the guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import thesean
from benchmarks import language
from benchmarks.studies.shares import CASE as SHARES
from benchmarks.studies.shares import CLOSED
from benchmarks.studies.starts import Conversion, of_digits, of_language_model
from benchmarks.studies.unlabelled import without_loss
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown, mean_and_ends, unmeasured

WAYS = {"aligned": 1.0, "tuned": 0.0}  # alignment's share


def bench(run: Run) -> None:
    for made in (of_digits, _texts):
        for seed in run.seeds:
            _measure(run, made(run.settings, seed), seed, "loss")
            _measure(run, without_loss(made(run.settings, seed)), seed, "divergence")


def _texts(settings: dict[str, object], seed: int) -> Iterator[Conversion]:
    return of_language_model(settings, seed, windowed=False)


def _measure(run: Run, given: Iterator[Conversion], seed: int, kind: str) -> None:
    for name, model, told in given:
        for steps, way in [(0, CLOSED), *itertools.product(run.settings["budgets"], WAYS)]:
            case = f"{name}, {kind}, {steps} steps, {way}"
            if not run.wants(case, seed):
                continue
            changes = {"alignment__share": WAYS[way], "fine_tuning__share": 1 - WAYS[way]} if steps else {}
            recipe = language.recipe("default" if steps else "fast", steps or None, **changes)
            report = thesean.compile(model, **told, recipe=recipe, seed=seed, progress=False).report
            run.add(
                case, seed, conversion=name, kind=kind, steps=steps, way=way, value=report.converted[kind],
                guide=report.guide[kind], seconds=round(report.seconds, 1),
            )  # fmt: skip


def table(result: Result) -> str:
    """A conversion a row, with labels and without; so many steps of either a column: means over seeds, and ends."""
    cases = result["cases"]
    columns = sorted({case["steps"] for case in cases} - {0})
    heads = ["held out", "told", "guide", CLOSED, *(f"{n} {way}" for n in columns for way in WAYS)]
    body = []
    for name, kind in dict.fromkeys((case["conversion"], case["kind"]) for case in cases):
        rows = [case for case in cases if (case["conversion"], case["kind"]) == (name, kind)]
        at = [(0, CLOSED), *itertools.product(columns, WAYS)]
        cells = [mean_and_ends([c["value"] for c in rows if (c["steps"], c["way"]) == of]) for of in at]
        body.append([name, kind, f"{rows[0]['guide']:.4f}", *cells])
    return "\n".join([*markdown(heads, body), *unmeasured(result)])


CASE = Case(
    question="Does a short trial tell whether alignment or fine-tuning brings a conversion further?",
    minutes=60,
    unit="loss, or divergence",
    run=bench,
    settings={**SHARES.settings, "budgets": [10, 20, 40]},
    quick={**SHARES.quick, "budgets": [2]},
    quick_only=SHARES.quick_only,
    seeds=SHARES.seeds,
    needs=SHARES.needs,
    table=table,
    partial=True,
)
