"""By what should the hidden features of a flattening MLP be normalised?

By the layer, by the batch, by both, one behind the other, or not at all: the residual convnet for Fashion-MNIST and the
digits demo's, and the attentions and the blocks of a small vision transformer on the digits, all by the default recipe.
Equal steps, data and seeds. Told is the accuracy on test data, of digits the held-out loss too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.language import recipe
from benchmarks.paper.conversions import conversions, measured
from benchmarks.studies import matrix
from benchmarks.studies.starts import DigitsTransformer, trained
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown, mean_and_ends, unmeasured

NORMS = ("layer", "batch", "both", "none")
FASHION = "Fashion-MNIST convnet"


def bench(run: Run) -> None:
    from examples.demo_digits import digits, train_guide

    data, held_out = digits()
    torch.manual_seed(0)
    transformer = trained(DigitsTransformer(), data, run.settings["guide_steps"])
    guides: dict[str, tuple[nn.Module, str]] = {
        "digits convnet": (train_guide(data, 0, run.settings["guide_steps"]), "block"),
        "digits transformer, attentions": (transformer, "sublayer"),
        "digits transformer, blocks": (transformer, "block"),
    }
    fashion = conversions(run.settings)["convnet to MLP"]
    for seed in run.seeds:
        for norm in NORMS:
            target = thesean.Target("mlp", hidden_norm=norm)
            for name, (guide, granularity) in guides.items():
                if not run.wants(f"{name}, {norm}", seed):
                    continue
                told: dict[str, Any] = dict(data=replace(data, seed=seed), eval_data=held_out, granularity=granularity)
                report = thesean.compile(
                    guide, target, **told, loss=thesean.cross_entropy, metric=thesean.accuracy,
                    recipe=recipe("default", run.settings["digits_steps"]), seed=seed, progress=False,
                ).report  # fmt: skip
                run.add(
                    f"{name}, {norm}", seed, conversion=name, norm=norm, loss=report.converted["loss"],
                    accuracy=report.converted["metric"], seconds=round(report.seconds, 1),
                )  # fmt: skip
            if run.wants(f"{FASHION}, {norm}", seed):
                found = measured(fashion, fashion.guide(True, 0), seed, recipe("default", fashion.steps), target=target)
                kept = {key: found[key] for key in ("loss", "accuracy", "failed") if key in found}
                run.add(f"{FASHION}, {norm}", seed, conversion=FASHION, norm=norm, **kept)


def table(result: Result) -> str:
    """A conversion a row: loss and percent right."""
    body = []
    for name in dict.fromkeys(case["conversion"] for case in result["cases"]):
        of = {norm: [c for c in result["cases"] if (c["conversion"], c["norm"]) == (name, norm)] for norm in NORMS}
        right = [
            mean_and_ends([100 * c["accuracy"] for c in rows if "accuracy" in c], digits=1) for rows in of.values()
        ]
        losses = [mean_and_ends([c["loss"] for c in rows if "loss" in c], 3) for rows in of.values()]
        body += [[name, "percent right", *right], ["", "loss", *losses]]
    return "\n".join([*markdown(["MLP in place of", "", *NORMS], body), *unmeasured(result)])


CASE = Case(
    question="By what should the hidden features of a flattening MLP be normalised?",
    minutes=15,
    unit="accuracy, nats",
    run=bench,
    settings={**matrix.CASE.settings, "guide_steps": 300, "digits_steps": 300},
    quick={**matrix.CASE.quick, "guide_steps": 2, "digits_steps": 2},
    quick_only=("digits convnet, both", "Fashion-MNIST convnet, both"),
    seeds=(0, 1, 2),
    needs=("transformers", "sklearn"),
    table=table,
    partial=True,
)
