"""The conversions of the study `matrix`: guide, data, target, and a run of one of them as a row's figures.

All methods take the same steps on the same batches, and each is left in the state that did best on validation data; the
figures are of test data, which nothing was chosen by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks import language
from benchmarks.paper import fashion
from benchmarks.suite import ROOT
from examples.text import Windows, corpus, held_out_windows
from thesean.distill.train import cosine
from thesean.errors import TheseanError
from thesean.recipe import Recipe

Batches = list[tuple[torch.Tensor, torch.Tensor]]

_WARMUP = 50


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """`model` makes the guide untrained, `trained` gives it trained; `settings` are the sizes that the study has for
    it: "batch", "steps", and what the data take besides. A guess among all classes is right `chance` of the times.
    """

    name: str
    model: Callable[[], nn.Module]
    trained: Callable[[], nn.Module]
    data: Callable[[int, int, int], Iterable[Any]]  # steps, batch, seed
    validation: Callable[[], Batches]
    test: Callable[[], Batches]
    told: dict[str, Any]  # what `compile` is told of the target
    steps: int
    batch: int
    chance: float
    unit: str = "accuracy"
    latency: dict[str, Any] = field(default_factory=dict)

    def guide(self, trained: bool, seed: int) -> nn.Module:
        if trained:
            return self.trained()
        torch.manual_seed(seed)
        return self.model().eval()

    def arguments(self, recipe: Recipe, seed: int, batch: int | None = None) -> dict[str, Any]:
        """Of `thesean.compile` and `thesean.baseline`."""
        return dict(
            data=self.data(max(16, self.steps), batch or self.batch, seed), eval_data=self.validation(),
            loss=thesean.cross_entropy, metric=thesean.accuracy, recipe=recipe, seed=seed, progress=False, **self.told,
        )  # fmt: skip


def train(model: nn.Module, data: Iterable[Any], steps: int, rate: float, kept: Path) -> nn.Module:
    """On the task alone, and kept: minutes where it isn't yet."""
    if not kept.exists():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.05)
        for step, (x, y) in zip(range(steps), data, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(step, steps, _WARMUP)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


def of_images(name: str, model: Callable[[], nn.Module], told: dict[str, Any], settings: dict[str, Any]) -> Conversion:
    """Of a guide for Fashion-MNIST."""
    steps, rate = settings["guides"][model.__name__]

    def trained() -> nn.Module:
        torch.manual_seed(0)
        kept = ROOT / "build" / "matrix" / f"{model.__name__}-{steps}-{rate:g}.pt"
        return train(model(), fashion.Drawn(steps, 128, seed=1000), steps, rate, kept)

    every = settings["every"]
    return Conversion(
        name=name, model=model, trained=trained, data=fashion.Drawn, told=told,
        validation=lambda: fashion.fashion().validation.batches()[::every],
        test=lambda: fashion.fashion().test.batches()[::every],
        steps=settings["steps"][model.__name__], batch=settings["images"], chance=1 / fashion.CLASSES,
    )  # fmt: skip


def of_text(name: str, told: dict[str, Any], settings: dict[str, Any]) -> Conversion:
    """Of the demo's language model, on the demo's text."""
    sizes, every = settings["text"], settings["every"]
    length = sizes["length"]

    def untrained() -> nn.Module:
        trained = language.guide(sizes["layers"])
        return type(trained)(trained.config)

    def data(steps: int, batch: int, seed: int) -> Windows:
        return Windows(corpus(held_out=False), batches=steps, batch=batch, length=length, seed=seed)

    held_out = held_out_windows(length)
    return Conversion(
        name=name, model=untrained, trained=lambda: language.guide(sizes["layers"]), data=data, told=told,
        validation=lambda: held_out[:: 5 * every], test=lambda: [b for i in (1, 3) for b in held_out[i :: 5 * every]],
        steps=settings["steps"]["gpt2"], batch=sizes["batch"], chance=0.2, unit="nats",
        latency={"contexts": [64, 512]},
    )  # fmt: skip


def conversions(settings: dict[str, Any]) -> dict[str, Conversion]:
    """The paper's four, by name, and variants of two of them after a comma."""
    convnet, deep, transformer = fashion.convnet, fashion.deep_convnet, fashion.VisionTransformer
    tokens = {"target": thesean.Target("mlp", tokens="each"), "granularity": "block"}
    mixed = {"target": thesean.Target("mlp", tokens="each", mixing="mixer"), "granularity": "block"}
    found = [
        of_images("convnet to MLP", convnet, {"target": "mlp"}, settings),
        of_images("deep to shallow convnet", deep, {"target": "resnet-block", "merge": 2}, settings),
        of_images("ViT to token-wise MLP", transformer, tokens, settings),
        of_text("GPT-2 to Elman", {"target": "elman", "granularity": "sublayer"}, settings),
        of_images("ViT to token-wise MLP, mixer", transformer, mixed, settings),
        of_text("GPT-2 to GRU", {"target": "gru", "granularity": "sublayer"}, settings),
        of_text("GPT-2 to rnn", {"target": "rnn", "granularity": "sublayer"}, settings),
    ]
    for cell in ("elman", "gru", "rnn"):
        whole = {"target": thesean.Target(cell, scope="part"), "granularity": "block"}
        called = {"elman": "Elman", "gru": "GRU"}.get(cell, cell)
        found.append(of_text(f"GPT-2 to {called}, whole blocks", whole, settings))
    return {c.name: c for c in found}


def measured(
    conversion: Conversion,
    guide: nn.Module,
    seed: int,
    recipe: Recipe,
    kind: Any = None,
    rate: float | None = None,
    batch: int | None = None,
    target: Any = None,
) -> dict[str, Any]:
    """One conversion, or a baseline of this kind: losses and accuracies of test data, those of the hybrids after each
    stage on validation data, what it took. An error of ours is what "failed" says.
    """
    arguments = conversion.arguments(recipe, seed, batch)
    if target is not None:
        arguments["target"] = target
    wall, cpu = time.monotonic(), time.process_time()
    try:
        if kind is None:
            converted = thesean.compile(guide, **arguments)
        else:
            converted = thesean.baseline(guide, kind=kind, learning_rate=rate, **arguments)
    except TheseanError as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    report = converted.report
    tuned = [curve for curve in report.curves if curve.phase != "align"]
    return {
        **judged(converted.module, conversion.test()),
        "validation": report.converted["loss"],
        "stages": [row.loss for row in report.stages],
        "stage_accuracies": [row.metric for row in report.stages],
        "steps": report.steps,
        "cpu_s": round(cpu, 1),
        "wall_s": round(wall, 1),
        "params": report.params,
        "rates": [[curve.learning_rate, len(curve.losses), min(v for _, v in curve.held_out)] for curve in tuned],
        "notes": list(report.notes),
    }


@torch.no_grad()
def judged(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Loss and accuracy a label."""
    wrong, right, count = 0.0, 0, 0
    for x, y in batches:
        output = model(x)
        logits = output["logits"] if isinstance(output, dict) else output
        logits, labels = logits.flatten(0, -2), y.flatten()
        wrong += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {"loss": wrong / count, "accuracy": right / count}
