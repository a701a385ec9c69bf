"""Does training ever end below its start, and what does a rate that is found buy over one that is fixed?

Eight conversions of four guides: the demo's language model and digits convnet, a small vision transformer on the
digits, and all-MiniLM-L6 (left out where not installed). Each in closed form, and from there with the default recipe at
the rate that it finds and at 2e-3, which was the default; the same steps, data and seed. Told is the loss on held-out
data, or without labels the divergence from the guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks import language
from benchmarks.suite import BenchmarkError, Case, Result, Run

RATES: dict[str, Any] = {"found rate": "find", "rate 2e-3": 2e-3}
WAYS = ("closed form", *RATES)


class DigitsTransformer(nn.Module):
    """pixels_B1HW -> logits_BC: rows of the image as tokens."""

    def __init__(self, side: int = 8, width: int = 48, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(side, width), nn.Parameter(0.1 * torch.randn(side, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(pixels.flatten(0, -3)) + self.places
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD.mean(1))


def trained(model: nn.Module, data: Iterable[Any], steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for x, y in itertools.islice(data, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


Conversion = tuple[str, nn.Module, dict[str, Any]]  # its name, the guide, and what `compile` is told


def conversions(run: Run) -> Iterator[Conversion]:
    yield from of_language_model(run.settings)
    yield from of_digits(run.settings)
    from benchmarks.studies import minilm

    try:
        encoder, sentences, others = minilm.pretrained()
    except BenchmarkError:
        return
    words = {"data": sentences, "eval_data": others[:4], "granularity": "sublayer"}
    yield "MiniLM -> narrow-heads", encoder, {"target": "narrow-heads", **words}


def of_language_model(settings: dict[str, Any], seed: int = 0, windowed: bool = True) -> Iterator[Conversion]:
    """Of its attentions and MLPs, one of them with a softmax window where wanted; the texts are drawn by the seed."""
    model = language.guide(settings["layers"])
    texts: dict[str, Any] = dict(
        data=language.windows(settings, seed), eval_data=language.held_out(settings["length"], settings["every"]),
        loss=thesean.cross_entropy, granularity="sublayer",
    )  # fmt: skip
    window = {"linear attention, window 32": thesean.Target("linear-attention", window=32)}
    targets: dict[str, Any] = {
        "linear attention": "linear-attention",
        **(window if windowed else {}),
        "gru": "gru",
        "narrow": "narrow",
    }
    for name, target in targets.items():
        yield f"language model -> {name}", model, {"target": target, **texts}


def of_digits(settings: dict[str, Any], seed: int = 0) -> Iterator[Conversion]:
    """The same two guides whatever the seed, by which images are shuffled."""
    from examples.demo_digits import digits, train_guide

    data, held_out = digits()
    images: dict[str, Any] = dict(data=replace(data, seed=seed), eval_data=held_out, loss=thesean.cross_entropy)
    yield "digits convnet -> mlp", train_guide(data, 0, settings["guide_steps"]), {"target": "mlp", **images}
    torch.manual_seed(0)
    transformer = trained(DigitsTransformer(), data, settings["guide_steps"])
    for target in ("token-mlp", "rnn"):
        yield f"digits transformer -> {target}", transformer, {"target": target, **images, "granularity": "sublayer"}


def bench(run: Run) -> None:
    for name, model, told in conversions(run):
        for seed in run.seeds:
            for way in WAYS:
                if not run.wants(f"{name}, {way}", seed):
                    continue
                fast = way == "closed form"
                changes = {} if fast else {"fine_tuning__learning_rate": RATES[way]}
                recipe = language.recipe("fast" if fast else "default", run.settings["steps"], **changes)
                report = thesean.compile(model, **told, recipe=recipe, seed=seed, progress=False).report
                kind = "divergence" if report.converted["loss"] is None else "loss"
                rates = [curve.learning_rate for curve in report.curves if curve.phase == "fine-tune"]
                run.add(
                    f"{name}, {way}", seed, conversion=name, way=way, kind=kind, value=report.converted[kind],
                    guide=report.guide[kind], rate=rates[-1] if rates else None, seconds=round(report.seconds, 1),
                )  # fmt: skip


def table(result: Result) -> str:
    """A conversion a row, a way a column; the mean over seeds, and the rates that were found."""
    cases = result["cases"]
    lines = [f"| held out | guide | {' | '.join(WAYS)} | rates found |", "|---|---:|" + "---:|" * (len(WAYS) + 1)]
    for name in dict.fromkeys(case["conversion"] for case in cases):
        of = {way: [c for c in cases if (c["conversion"], c["way"]) == (name, way)] for way in WAYS}
        means = {way: sum(c["value"] for c in rows) / len(rows) for way, rows in of.items() if rows}
        cells = [f"{means[way]:.4f}" if way in means else "-" for way in WAYS]
        found = ", ".join(f"{rate:g}" for rate in sorted({c["rate"] for c in of["found rate"]}))
        guide = next(iter(of["closed form"]), next(iter(of["found rate"]), None))
        lines.append(f"| {name} | {guide['guide'] if guide else 0:.4f} | {' | '.join(cells)} | {found} |")
    return "\n".join(lines)


CASE = Case(
    question="Does training ever end below its start, and what does a found rate buy?",
    minutes=20,
    unit="nats of held-out data, or divergence",
    run=bench,
    settings={"steps": 100, "batch": 4, "length": 256, "every": 8, "layers": None, "guide_steps": 300},
    quick={"steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1, "guide_steps": 2},
    quick_only=("language model -> gru", "digits convnet -> mlp"),
    seeds=(0,),
    needs=("transformers", "sklearn"),
    table=table,
)
