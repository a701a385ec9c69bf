"""Convolutional networks with fewer channels: what is it worth that they are chosen, and what is left solved?

Three small convnets, each trained on the digits of scikit-learn: residual blocks with norms in front, residual blocks
that rectify their sums, and plain convolutions in a row; and residual blocks with norms in front on Fashion-MNIST
(`apt-get install dataset-fashion-mnist`). Each gets three quarters, half and a quarter of the channels
inside its blocks, or of all between two plain convolutions. Beside `narrow`: channels with the largest weights, as
filter pruning takes them (Li et al. 2017), none of what goes folded in; and the same network from scratch. All three at
as many steps on the same batches, each with a rate that it finds by itself or, from scratch, the best of a few.
"""

from __future__ import annotations

import itertools
import statistics
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks.paper.fashion import Drawn, convnet, fashion
from benchmarks.studies.convolutions import Rectified
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown
from thesean import Target
from thesean.errors import LostError
from thesean.recipe import Recipe
from thesean.targets import TargetModule
from thesean.targets.narrow_channels import NarrowChannels

OURS, LARGEST, SCRATCH = "narrow", "largest weights", "from scratch"
FASHION = "Fashion-MNIST"


class Plain(nn.Module):
    """Convolutions in a row, as VGG has them."""

    def __init__(self, widths: tuple[int, ...] = (1, 32, 32, 64, 64, 64)) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(nn.Conv2d(into, out, 3, padding=1) for into, out in pairs)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, conv in enumerate(self.convs):
            x = F.relu(conv(x))
            x = F.max_pool2d(x, 2) if number == 1 else x
        return self.head(x.mean((2, 3)))


def guide_of(kind: str, data: Any, seed: int, steps: int) -> nn.Module:
    from examples.demo_digits import Block, train, train_guide

    if kind in ("pre-activated", "rectified"):
        return train_guide(data, seed, steps, {"pre-activated": Block, "rectified": Rectified}[kind])
    torch.manual_seed(seed)
    model: nn.Module = convnet() if kind == FASHION else Plain()
    return train(model, data, steps, 1e-2)


def bench(run: Run) -> None:
    from examples.demo_digits import digits

    data, held_out = digits()
    given: dict[str, Any] = {"loss": thesean.cross_entropy, "metric": thesean.accuracy, "progress": False}
    for seed in run.seeds:
        for kind in run.settings["guides"]:
            given |= {"data": data, "eval_data": held_out}
            if kind == FASHION:
                given["data"], given["eval_data"] = Drawn(600, 64, seed), fashion().validation.batches()
            guide = guide_of(kind, given["data"], seed, run.settings["guide_steps"])
            for ratio in run.settings["ratios"]:
                one_size(run, seed, kind, guide, ratio, given)


def one_size(run: Run, seed: int, kind: str, guide: nn.Module, ratio: float, given: dict[str, Any]) -> None:
    """All three ways to one network, before any step and after them."""
    target, steps = Target("narrow", ratio=ratio), run.settings["steps"]
    trained = Recipe.named("default").model_copy(update={"steps": steps})
    closed = Recipe.named("fast")
    unsolved = {"closed_form": trained.closed_form.model_copy(update={"enabled": False})}
    as_it_is = mock.patch.object(NarrowChannels, "prepare", TargetModule.prepare)
    ways = {(OURS, "start"): closed, (OURS, "trained"): trained}
    ways |= {
        (LARGEST, "start"): closed.model_copy(update=unsolved),
        (LARGEST, "trained"): trained.model_copy(update=unsolved),
    }
    for (way, stage), recipe in ways.items():
        name = f"{kind}, {ratio:g}, {way}, {stage}"
        if run.wants(name, seed):
            with as_it_is if way == LARGEST else nullcontext():
                report = told(guide, target, recipe, seed, given)
            add(run, name, seed, (kind, ratio, way, stage), report)
    name = f"{kind}, {ratio:g}, {SCRATCH}, trained"
    if run.wants(name, seed):
        rates = {rate: thesean.baseline(guide, target, kind="scratch", learning_rate=rate, recipe=trained, seed=seed,
                                        **given).report for rate in run.settings["rates"]}  # fmt: skip
        best = min(rates, key=lambda rate: float(rates[rate].converted["loss"] or 0))
        add(run, name, seed, (kind, ratio, SCRATCH, "trained"), rates[best])


def told(guide: nn.Module, target: Target, recipe: Recipe, seed: int, given: dict[str, Any]) -> Any:
    """The report, of one that is worse than nothing as well."""
    try:
        return thesean.compile(guide, target, recipe=recipe, seed=seed, **given).report
    except LostError as lost:
        return lost.converted.report


def add(run: Run, name: str, seed: int, about: tuple[str, float, str, str], report: Any) -> None:
    kind, ratio, way, stage = about
    figures = {"guide_loss": report.guide["loss"], "guide_accuracy": report.guide["metric"]}
    run.add(
        name, seed, guide=kind, ratio=ratio, way=way, stage=stage, params=report.params, flops=report.flops,
        **figures, **report.converted,
    )  # fmt: skip


def table(result: Result) -> str:
    """A row a network and size: loss and accuracy of each way, at the start and after the steps."""
    found: dict[tuple[str, float], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in result["cases"]:
        found.setdefault((row["guide"], row["ratio"]), {}).setdefault((row["way"], row["stage"]), []).append(row)
    columns = [(OURS, "start"), (LARGEST, "start"), (OURS, "trained"), (LARGEST, "trained"), (SCRATCH, "trained")]
    body = []
    for (kind, ratio), ways in found.items():
        rows = next(iter(ways.values()))
        of_guide = f"{mean(rows, 'guide_loss'):.3f} / {mean(rows, 'guide_accuracy'):.1%}"
        cells = [shown(ways[column]) if column in ways else "not measured" for column in columns]
        body.append([kind, f"{ratio:g}", f"{rows[0]['params'] / 1000:.0f} k", of_guide, *cells])
    heads = ["guide", "ratio", "parameters", "the guide's", *(f"{way}, {stage}" for way, stage in columns)]
    seeds = len(result["seeds"])
    told = f"Nats / right answers on held-out images, means of {seeds} seeds; {result['settings']['steps']} steps."
    return "\n".join([told, "", *markdown(heads, body, names=2)])


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def shown(rows: list[dict[str, Any]]) -> str:
    return f"{mean(rows, 'loss'):.3f} / {mean(rows, 'metric'):.1%}"


CASE = Case(
    question="What are channels worth that are chosen and solved, beside the largest ones and a network from scratch?",
    minutes=30,
    unit="nats",
    run=bench,
    settings={
        "guides": ["pre-activated", "rectified", "plain", FASHION], "ratios": [0.75, 0.5, 0.25], "steps": 150,
        "guide_steps": 300, "rates": [1e-2, 3e-3, 1e-3],
    },
    quick={"guides": ["plain"], "ratios": [0.5], "steps": 2, "guide_steps": 2, "rates": [1e-3]},
    seeds=(0, 1, 2),
    needs=("sklearn",),
    table=table,
)  # fmt: skip
