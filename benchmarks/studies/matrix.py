"""The paper's matrix at small scale, on real data: four conversions, each from a trained and an untrained guide.

A residual convnet becomes an MLP and a deeper one a shallower one, a vision transformer becomes a token-wise MLP
(Fashion-MNIST), the demo's GPT-2 an Elman network (its text): by the default, by the paper's recipe, from scratch and
by logit distillation. Then one thing at a time is changed in the paper's recipe: schedule, measure, batch, norm. What
goes wrong is a row too. Equal optimizer steps on equal batches; figures are of test data that nothing was chosen by.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

import thesean
from benchmarks.paper.conversions import Conversion, conversions, judged, measured
from benchmarks.paper.rows import Rates, every
from benchmarks.paper.tables import tables
from benchmarks.suite import Case, Run


def bench(run: Run) -> None:
    found = conversions(run.settings)

    @cache
    def guide(name: str, trained: bool, seed: int) -> nn.Module:
        return found[name].guide(trained, seed)

    for row, seed in every(found, run.seeds, Rates(run)):
        if run.wants(f"{row.conversion}: served"):
            of = found[row.conversion]
            run.add(f"{of.name}: served", conversion=of.name, **served(of, guide(of.name, True, 0), run))
        if not run.wants(row.name, seed):
            continue
        conversion = found[row.conversion]
        model = guide(row.conversion, row.trained, 0 if row.trained else seed)
        about = {"conversion": row.conversion, "what": row.what, "trained": row.trained}
        run.add(row.name, seed, **about, **measured(conversion, model, seed, **row.run(conversion)))


def served(conversion: Conversion, guide: nn.Module, run: Run) -> dict[str, Any]:
    """What does not depend on training: sizes and latencies in onnxruntime; and the guides' own figures."""
    data = conversion.data(16, conversion.batch, 0)
    converted = thesean.baseline(
        guide, kind="distillation", data=data, recipe="fast", progress=False, **conversion.told
    )
    found = converted.benchmark(repeats=run.settings["repeats"], **conversion.latency)
    untrained = judged(conversion.guide(False, 0), conversion.test())
    return {
        "unit": conversion.unit,
        "chance": conversion.chance,
        "guide": judged(guide, conversion.test()),
        "untrained": untrained,
        "params": {"guide": sum(p.numel() for p in guide.parameters()), "converted": converted.report.params},
        "latency": {"guide": found.guide, "converted": found.converted},
    }


CASE = Case(
    question="The paper's conversions at small scale: what do its recipe, the default and baselines reach?",
    minutes=400,
    unit="accuracy, nats a character",
    run=bench,
    settings={
        "images": 128, "steps": {"convnet": 600, "deep_convnet": 300, "VisionTransformer": 400, "gpt2": 200},
        "guides": {"convnet": [1200, 3e-3], "deep_convnet": [1200, 3e-3], "VisionTransformer": [2000, 1e-3]},
        "text": {"batch": 4, "length": 128, "layers": None}, "every": 1, "repeats": 30,
    },
    quick={
        "images": 32, "steps": {"convnet": 4, "deep_convnet": 2, "VisionTransformer": 2, "gpt2": 2},
        "guides": {"convnet": [2, 3e-3], "deep_convnet": [2, 3e-3], "VisionTransformer": [2, 1e-3]},
        "text": {"batch": 2, "length": 16, "layers": 1}, "every": 20, "repeats": 2,
    },
    quick_only=(
        "convnet to MLP: served", "convnet to MLP: default, untrained",
        "convnet to MLP: paper, batch norm alone",
        "deep to shallow convnet: scratch, rate 0.002", "ViT to token-wise MLP: paper, rate 0.002",
        "GPT-2 to Elman: distillation, rate 0.002",
    ),
    seeds=(0, 1, 2),
    needs=("transformers", "onnxruntime", "sklearn"),
    table=tables,
    partial=True,
)  # fmt: skip
