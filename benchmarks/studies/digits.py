"""Which learning rate is each method's best on the digits demo? Guide, data and steps are the demo's."""

from __future__ import annotations

import statistics
from typing import Any

import thesean
from benchmarks.suite import Case, Result, Run

METHODS: tuple[Any, ...] = ("converted", "scratch", "distillation")


def bench(run: Run) -> None:
    from examples.demo_digits import digits, recipe, train_guide

    data, held_out = digits()
    steps = run.settings["steps"]
    for seed in run.seeds:
        guide = train_guide(data, seed, steps)
        for rate in run.settings["rates"]:
            common: dict[str, Any] = dict(
                target="mlp", data=data, eval_data=held_out, loss=thesean.cross_entropy, metric=thesean.accuracy,
                recipe=recipe(rate, steps), seed=seed, progress=False,
            )  # fmt: skip
            for method in METHODS:
                name = f"{method}, rate {rate:g}"
                if not run.wants(name, seed):
                    continue
                if method == "converted":
                    model = thesean.compile(guide, **common)
                else:
                    model = thesean.baseline(guide, kind=method, **common)
                run.add(name, seed, method=method, rate=rate, **model.report.converted)


def table(result: Result) -> str:
    """Mean loss over seeds, with its range, method by method."""
    rates = sorted({row["rate"] for row in result["cases"]})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---:|" * len(rates)]
    for method in METHODS:
        cells = []
        for rate in rates:
            losses = [r["loss"] for r in result["cases"] if (r["method"], r["rate"]) == (method, rate)]
            cells.append(f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})" if losses else "-")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


CASE = Case(
    question="Which learning rate is each method's best on the digits demo?",
    minutes=5,
    unit="nats",
    run=bench,
    settings={"rates": [5e-4, 1e-3, 2e-3, 4e-3], "steps": 300},
    quick={"rates": [1e-3], "steps": 4},
    seeds=(0, 1, 2),
    needs=("sklearn",),
    table=table,
)
