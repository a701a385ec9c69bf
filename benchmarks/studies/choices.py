"""How much does each choice matter that the paper leaves open, and each that its recipe takes from it?

A small vision transformer, trained on digits, whose four attentions become MLPs over all of its tokens: by the recipe
`paper`, and by it with one choice changed, at equal steps on equal batches. Told are the held-out loss and accuracy at
the end, the loss of the last hybrid before fine-tuning, and the steps that alignment took, of which it leaves the rest
to fine-tuning.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

import thesean
from benchmarks.language import recipe
from benchmarks.studies.starts import DigitsTransformer, trained
from benchmarks.suite import Case, Result, Run

CHECKS = {"alignment__check_every": 10}  # of all rows, or few stages would be long enough to end before their steps do
THROUGH = {"alignment__patience": 10**6, "alignment__ceiling": 0.0}

# What is changed in the recipe `paper`, and what it has there.
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("", {}),
    "tokens as samples": ("examples", {"alignment__samples": "tokens"}),
    "rows normalised": ("as they are", {"alignment__normalize_rows": True}),
    "mean over parts": ("sum", {"alignment__reduction": "mean"}),
    "Adam": ("AdamW", {"optimizer": "adam"}),
    "constant rate": ("cosine", {"learning_rate_schedule": "constant"}),
    "Adam at a constant rate": ("AdamW with cosine", {"optimizer": "adam", "learning_rate_schedule": "constant"}),
    "stages run through": ("stopped", THROUGH),
    "nothing solved after a stage": ("solved", {"alignment__refit": False}),
    "normalised squared error": ("CKA", {"alignment__measure": "nmse"}),
    "last stage by both": ("CKA", {"alignment__stage_measures": {4: {"cka": 1.0, "nmse": 1.0}}}),
}


def bench(run: Run) -> None:
    from examples.demo_digits import digits

    data, held_out = digits()
    steps = run.settings["steps"]
    for seed in run.seeds:
        torch.manual_seed(seed)
        guide = trained(DigitsTransformer(blocks=4), data, run.settings["guide_steps"])
        for name, (instead, changes) in CHOICES.items():
            if not run.wants(name, seed):
                continue
            report = thesean.compile(
                guide, "token-mlp", data=data, eval_data=held_out, loss=thesean.cross_entropy, metric=thesean.accuracy,
                granularity="sublayer", recipe=recipe("paper", steps, **CHECKS, **changes), seed=seed, progress=False,
            ).report  # fmt: skip
            stages = [curve for curve in report.curves if curve.phase == "align"]
            run.add(
                name, seed, instead=instead, loss=report.converted["loss"], accuracy=report.converted["metric"],
                hybrid=report.stages[-1].loss, aligned=sum(len(curve.losses) for curve in stages), steps=report.steps,
                guide=report.guide["loss"], guide_accuracy=report.guide["metric"], seconds=round(report.seconds, 1),
            )  # fmt: skip


def table(result: Result) -> str:
    """A choice a row: means over seeds with their range, and how far from the recipe as it is, seed by seed."""
    cases, seeds = result["cases"], len({case["seed"] for case in result["cases"]})
    by = {name: {c["seed"]: c for c in cases if c["name"] == name} for name in CHOICES}
    guide = statistics.fmean(c["guide"] for c in by["as it is"].values())
    lines = [
        f"{result['settings']['steps']} steps in all; {seeds} seeds, a guide each, at {guide:.3f} nats in the mean.",
        "",
        "| choice | in place of | loss | less than as it is | accuracy | last hybrid | steps of alignment |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in by.items():
        if not rows:
            continue
        gains = [by["as it is"][seed]["loss"] - case["loss"] for seed, case in rows.items() if seed in by["as it is"]]
        cells = [
            _spread([c["loss"] for c in rows.values()], 3), _spread(gains, 3),
            _spread([100 * c["accuracy"] for c in rows.values()], 1), _spread([c["hybrid"] for c in rows.values()], 2),
            f"{statistics.fmean(c['aligned'] for c in rows.values()):.0f}",
        ]  # fmt: skip
        lines.append(f"| {name} | {next(iter(rows.values()))['instead']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    """The mean, and lowest and highest."""
    around = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{around}"


CASE = Case(
    question="How much does each choice matter that the paper leaves open?",
    minutes=15,
    unit="nats",
    run=bench,
    settings={"steps": 600, "guide_steps": 600},
    quick={"steps": 8, "guide_steps": 4},
    quick_only=("as it is", "tokens as samples", "rows normalised", "Adam at a constant rate", "last stage by both"),
    seeds=(0, 1, 2),
    needs=("sklearn",),
    table=table,
)
