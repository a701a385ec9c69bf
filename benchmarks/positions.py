"""What the studies of positions share: a small guide trained on the demo's text, its conversions with windows that know
the guide's positions and with ones that don't, and a table of the seeds.

Nats per held-out character, in closed form alone and after some steps, with sequences of 256 characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks import language
from benchmarks.suite import Case, Run
from examples.text import Windows, corpus
from thesean.targets import PartFacts, build_module
from thesean.targets.linear_attention import LinearAttention

WINDOWS = (None, 16, 64)
_BATCH, _RATE, _WARMUP = 8, 3e-3, 100


@dataclass(frozen=True, kw_only=True)
class Study:
    """`model(layers, width)` is the guide before training, kept under `name` in build/ once it is trained. `left_out`:
    what the windows without its positions are called, and how they are taken out of a module; `mixers` finds the
    guide's attentions.
    """

    name: str
    model: Callable[[int, int], Any]
    mixers: str
    left_out: str
    leave_out: Callable[[LinearAttention], None]

    def guide(self, settings: dict[str, Any]) -> nn.Module:
        """The trained model, the same in every run; minutes where it isn't kept yet."""
        return trained(self.name, self.model, settings)

    def without(self, window: int) -> thesean.Target:
        """Linear attention whose window knows nothing of the guide's positions."""

        def build(part: PartFacts) -> nn.Module:
            made = build_module(target(window), part)
            assert isinstance(made, LinearAttention)
            self.leave_out(made)
            return made

        return thesean.Target(self.left_out.replace(" ", "-"), build=build)

    def experiments(self, steps: int) -> dict[str, dict[str, Any]]:
        """Name -> arguments of `language.convert`."""
        # where the closed form ends near the guide, the default rate first leads away from it
        gentle = language.recipe(
            steps=steps, alignment__share=0.0, alignment__schedule="none", fine_tuning__learning_rate=5e-4
        )
        runs: dict[str, dict[str, Any]] = {}
        for window in WINDOWS:
            named, chosen = called(window), target(window)
            runs[f"fast, {named}"] = {"target": chosen, "recipe": language.recipe("fast")}
            runs[f"{steps} steps, {named}"] = {"target": chosen, "recipe": language.recipe(steps=steps)}
            if window is None:
                continue
            left_out = {"target": {self.mixers: self.without(window)}, "recipe": language.recipe("fast")}
            runs[f"fast, {named}, {self.left_out}"] = left_out
            runs[f"{steps} gentle steps, {named}"] = {"target": chosen, "recipe": gentle}
        return runs

    def bench(self, run: Run) -> None:
        language.convert_all(run, self.guide(run.settings), self.experiments(run.settings["steps"]))

    def case(self, question: str) -> Case:
        return Case(
            question=question,
            minutes=25,
            unit="nats a character",
            run=self.bench,
            seeds=(0, 1, 2),
            settings={
                "steps": 100, "batch": 4, "length": 256, "every": 4, "layers": 4, "width": 128, "guide_steps": 1500,
            },
            quick={
                "steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1, "width": 16, "guide_steps": 2,
            },
            quick_only=("fast, window 16", f"fast, window 16, {self.left_out}"),
            needs=("transformers",),
            table=partial(language.table_of_seeds, heading="run"),
        )  # fmt: skip


def trained(name: str, build: Callable[[int, int], Any], settings: dict[str, Any]) -> nn.Module:
    """A model of so many layers and this width, trained on the demo's text; kept in build/."""
    model, steps = build(settings["layers"], settings["width"]), settings["guide_steps"]
    kept = Path("build", name, f"{settings['layers']}-{settings['width']}-{steps}-{settings['length']}.pt")
    if not kept.exists():
        train(model, steps, settings["length"])
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    ready: nn.Module = model.eval()
    return ready


def train(model: nn.Module, steps: int, length: int) -> None:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    data = Windows(corpus(held_out=False), batches=steps, batch=_BATCH, length=length, seed=0)
    for step, (ids, wanted) in enumerate(data):
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1, (step + 1) / _WARMUP) * cosine
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def called(window: int | None) -> str:
    return "no window" if window is None else f"window {window}"


def target(window: int | None) -> thesean.Target:
    return thesean.Target("linear-attention", window=window or 0)
