"""Where batches come again: when should fine-tuning let go of the guide?

Six conversions of three guides, by the default recipe, on few batches (language: 100 of 4 x 256 characters, so that
each comes four times; digits: a pass of them, again and again), and those of the language model on as many as there are
steps too. The weights of the guide's outputs and part exits fall to 0 by four fifths of the steps, or fall only with
examples that are new, or stay; of as many batches as steps the first two are the same. The same steps, data and seeds.
Told is the loss on held-out data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import thesean
from benchmarks import language
from benchmarks.studies.starts import Conversion, of_digits, of_language_model
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown, mean_and_ends, unmeasured
from examples.demo_digits import Shuffled

LET_GO, NEW, HELD = "falls on every step", "falls with what is new", "stays"
WAYS: dict[str, dict[str, Any]] = {
    LET_GO: {"fine_tuning__anneal_on": "all"},
    NEW: {"fine_tuning__anneal_on": "new"},
    HELD: {"fine_tuning__anneal_until": None},
}


def conversions(run: Run, seed: int, batches: int) -> Iterator[Conversion]:
    """Digits come where language does on few batches: they are as many as there are."""
    settings = {**run.settings, "steps": batches}
    yield from of_language_model(settings, seed, windowed=False)
    if batches < run.settings["steps"]:
        yield from of_digits(settings, seed)


def batches_of(data: Any) -> int:
    """Those of one pass."""
    return len(data.x) // data.batch if isinstance(data, Shuffled) else len(data)


def bench(run: Run) -> None:
    """What the default stands on comes first, of all seeds."""
    few, steps = run.settings["few"], run.settings["steps"]
    for batches, ways in ((few, (LET_GO, NEW)), (few, (HELD,)), (steps, (NEW, HELD))):
        again = "" if batches == steps else ", again and again"
        for seed in run.seeds:
            for (name, model, told), way in itertools.product(conversions(run, seed, batches), ways):
                if not run.wants(f"{name}{again}, {way}", seed):
                    continue
                recipe = language.recipe("default", steps, **WAYS[way])
                report = thesean.compile(model, **told, recipe=recipe, seed=seed, progress=False).report
                run.add(
                    f"{name}{again}, {way}", seed, conversion=name, batches=batches_of(told["data"]), way=way,
                    loss=report.converted["loss"], guide=report.guide["loss"],
                    divergence=report.converted["divergence"], seconds=round(report.seconds, 1),
                )  # fmt: skip


def table(result: Result) -> str:
    """A conversion on so many batches a row, a way a column: means over seeds, lowest and highest."""
    cases, steps = result["cases"], result["settings"]["steps"]
    body = []
    for name, batches in dict.fromkeys((case["conversion"], case["batches"]) for case in cases):
        rows = [case for case in cases if (case["conversion"], case["batches"]) == (name, batches)]
        of = {way: [c for c in rows if c["way"] == way] for way in WAYS}
        cells = {way: mean_and_ends([c["loss"] for c in found]) for way, found in of.items()}
        if batches >= steps:
            cells[LET_GO] = "the same"
        told_apart = [found for way, found in of.items() if way != LET_GO or batches < steps]
        off = [f"{sum(c['divergence'] for c in found) / len(found):.3f}" if found else "-" for found in told_apart]
        body.append([name, str(batches), f"{rows[0]['guide']:.4f}", *cells.values(), ", ".join(off)])
    heads = ["loss held out", "batches", "guide", *(f"weight {way}" for way in WAYS), "divergence of each"]
    return "\n".join([*markdown(heads, body), *unmeasured(result)])


CASE = Case(
    question="Where batches come again: when should fine-tuning let go of the guide?",
    minutes=95,
    unit="nats of held-out data",
    run=bench,
    settings={"steps": 400, "few": 100, "batch": 4, "length": 256, "every": 8, "layers": None, "guide_steps": 300},
    quick={"steps": 2, "few": 1, "batch": 2, "length": 32, "every": 80, "layers": 1, "guide_steps": 2},
    quick_only=("language model -> gru", "digits convnet -> mlp"),
    seeds=(0, 1, 2),
    needs=("transformers", "sklearn"),
    table=table,
    partial=True,
)
