"""What is a look-ahead worth where a guide that reads both ways becomes a stream?

The guide, two bidirectional LSTM layers, fills in the vowels that were taken out of the demo's text; it is trained
first, and kept in build/. Its layers become recurrences (`rnn`, which is `mingru` here) that read no later step, or a
few: two layers in a row read twice as many. Nats per vowel that was taken out, on held-out text, in closed form alone
and after some steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from examples.text import ALPHABET, Windows, corpus, held_out_windows

_KEPT = Path("build/lookahead")
_RATE = 4e-3

VOWELS = torch.tensor([ALPHABET.index(c) for c in "aeiouAEIOU"])
TAKEN = ALPHABET.index("~")  # stands where a vowel was


def taken_out(ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The text without its vowels, and which they were, -100 at all other characters."""
    is_vowel_BT = torch.isin(ids_BT, VOWELS)
    return ids_BT.masked_fill(is_vowel_BT, TAKEN), ids_BT.masked_fill(~is_vowel_BT, -100)


@dataclass(frozen=True)
class Texts:
    """Batches of texts without vowels, the same at every pass."""

    windows: Windows

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for ids_BT, _ in self.windows:
            yield taken_out(ids_BT)

    def __len__(self) -> int:
        return len(self.windows)


def texts(batches: int, batch: int, length: int, seed: int) -> Texts:
    return Texts(Windows(corpus(held_out=False), batches=batches, batch=batch, length=length, seed=seed))


class BothWays(nn.Module):
    """x + W [h ahead, h back] of the normed x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cell = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.out(self.cell(self.norm(x_BTD))[0])


class Reader(nn.Module):
    """ids_BT -> logits_BTV."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(ALPHABET), width)
        self.layers = nn.ModuleList(BothWays(width) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ALPHABET)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x_BTD = self.words(ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(x_BTD)


def guide(settings: dict[str, Any]) -> nn.Module:
    """The trained reader, the same in every run."""
    torch.manual_seed(0)
    model, steps = Reader(settings["layers"], settings["width"]), settings["guide_steps"]
    kept = _KEPT / f"{settings['layers']}-{settings['width']}-{steps}-{settings['length']}.pt"
    if not kept.exists():
        optimizer = torch.optim.AdamW(model.parameters(), _RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for ids_BT, vowels_BT in texts(steps, settings["batch"], settings["length"], seed=0):
            loss = F.cross_entropy(model(ids_BT).flatten(0, 1), vowels_BT.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


def targets(ahead: list[int]) -> dict[str, thesean.Target]:
    """What the layers become, by the steps that each reads."""
    streams = {f"{k} steps ahead" if k != 1 else "1 step ahead": thesean.Target("rnn", lookahead=k) for k in ahead}
    return {"no later step": thesean.Target("rnn", causal=True), **streams, "both ways": thesean.Target("rnn")}


def bench(run: Run) -> None:
    settings = run.settings
    steps, batch, length = (settings[key] for key in ("steps", "batch", "length"))
    model = guide(settings)
    held_out = [taken_out(ids_BT) for ids_BT, _ in held_out_windows(length)[:: settings["every"]]]
    for recipe in (language.recipe("fast"), language.recipe(steps=steps)):
        for name, target in targets(settings["ahead"]).items():
            row = f"{'fast' if recipe.name == 'fast' else f'{steps} steps'}, {name}"
            for seed in run.seeds:
                if not run.wants(row, seed):
                    continue
                start = time.monotonic()
                data = texts(max(16, steps), batch, length, seed + 1)
                converted = thesean.compile(
                    model, {"layers.*": target}, data=data, eval_data=held_out, loss=thesean.cross_entropy,
                    recipe=recipe, seed=seed, progress=False,
                )  # fmt: skip
                report = converted.report
                figures = {"loss": report.converted["loss"], "guide": report.guide["loss"], "params": report.params}
                run.add(row, seed, **figures, seconds=round(time.monotonic() - start, 1))


CASE = Case(
    question="What is a look-ahead worth where a guide that reads both ways becomes a stream?",
    minutes=6,
    unit="nats a vowel",
    run=bench,
    seeds=(0, 1, 2),
    settings={
        "steps": 200, "batch": 32, "length": 64, "every": 8, "layers": 2, "width": 64, "guide_steps": 300,
        "ahead": [1, 2, 4],
    },
    quick={
        "steps": 2, "batch": 4, "length": 32, "every": 80, "layers": 1, "width": 8, "guide_steps": 2, "ahead": [2],
    },
    table=partial(language.table_of_seeds, heading="each layer reads"),
)  # fmt: skip
