"""How many of a recipe's steps should go to alignment, and how many to fine-tuning?

Nine conversions of four guides, those of `rates`. Each in closed form, and from there with the default recipe, in which
alignment has as large a share of the steps as a column says. The same steps, data and seeds. Told is the loss on
held-out data, or without labels the divergence from the guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import thesean
from benchmarks import language
from benchmarks.studies.rates import conversions
from benchmarks.studies.starts import Conversion
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown, mean_and_ends, unmeasured

CLOSED = "closed form"
FOUND = "auto"  # by a trial

Share = float | str


def bench(run: Run) -> None:
    for seed in run.seeds:
        ways = itertools.product(run.settings["budgets"], run.settings["shares"])
        measure(run, conversions(run, seed), seed, list(ways))


def measure(run: Run, given: Iterable[Conversion], seed: int, ways: Sequence[tuple[int, Share]]) -> None:
    """Each in closed form, and at every number of steps with its share."""
    for name, model, told in given:
        for steps, share in [(0, None), *ways]:
            way = CLOSED if share is None else f"{steps} steps, share {share if share == FOUND else format(share, 'g')}"
            if not run.wants(f"{name}, {way}", seed):
                continue
            changes = {} if share is None else {"alignment__share": share}
            if isinstance(share, float):
                changes["fine_tuning__share"] = 1 - share
            recipe = language.recipe("default" if steps else "fast", steps or None, **changes)
            report = thesean.compile(model, **told, recipe=recipe, seed=seed, progress=False).report
            kind = "divergence" if report.converted["loss"] is None else "loss"
            run.add(
                f"{name}, {way}", seed, conversion=name, steps=steps, share=share, kind=kind,
                value=report.converted[kind], guide=report.guide[kind], divergence=report.converted["divergence"],
                seconds=round(report.seconds, 1),
            )  # fmt: skip


def table(result: Result) -> str:
    """A conversion at so many steps a row, a share a column: means over seeds, lowest and highest."""
    cases = result["cases"]
    told = {case["share"] for case in cases if case["share"] is not None}
    shares = sorted(told - {FOUND})
    heads = ["held out", "steps", "guide", CLOSED, *(f"{share:.0%} alignment" for share in shares)]
    if FOUND in told:
        shares.append(FOUND)
        heads.append("as a trial tells")
    body = []
    for name, steps in dict.fromkeys((case["conversion"], case["steps"]) for case in cases if case["steps"]):
        rows = [c for c in cases if c["conversion"] == name and c["steps"] in (0, steps)]
        cells = [mean_and_ends([c["value"] for c in rows if c["share"] == share]) for share in (None, *shares)]
        body.append([name, str(steps), f"{rows[0]['guide']:.4f}", *cells])
    return "\n".join([*markdown(heads, body), *unmeasured(result)])


CASE = Case(
    question="How many of a recipe's steps should go to alignment?",
    minutes=70,
    unit="nats of held-out data, or divergence",
    run=bench,
    settings={
        "budgets": [100],
        "shares": [0.1, 0.5, 1.0],
        "steps": 100,
        "batch": 4,
        "length": 256,
        "every": 8,
        "layers": None,
        "guide_steps": 300,
    },
    quick={
        "budgets": [2], "shares": [0.1, 1.0], "steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1,
        "guide_steps": 2,
    },
    quick_only=("language model -> gru", "digits convnet -> mlp"),
    seeds=(0, 1, 2),
    needs=("transformers", "sklearn"),
    table=table,
    partial=True,
)  # fmt: skip
