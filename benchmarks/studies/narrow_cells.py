"""Recurrent guides with fewer units: what is it worth that they are chosen, and the others folded in?

Three guides that read and write characters of Jane Austen's novels, two of which are held out: a language model of two
LSTMs, one of a GRU, and two LSTMs of two directions that tell vowels which were left out. Each gets three quarters,
half and a third of its units. Beside `narrow`: the units with the largest weights, with nothing folded in; and units
chosen by what gates and output make of them, as `narrow` chooses an MLP's, with the others folded in as `narrow` does.
At half of the units also after steps on the same batches, beside the same network from scratch at the best of a few
rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks.rivalry.novels import HELD_OUT, novels
from benchmarks.studies.channels import LARGEST, OURS, SCRATCH, mean, told
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown
from thesean import Target
from thesean.recipe import Recipe
from thesean.targets import TargetModule
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.select_features import moments, select_features
from thesean.targets.shared.torch_cell import CellTarget

PRODUCTS = "chosen by products"
BATCH, TIME, EMBEDDED, UNKNOWN = 16, 96, 64, 0

Pair = tuple[torch.Tensor, torch.Tensor]


class Reader(nn.Module):
    """ids_BT -> logits_BTV"""

    def __init__(self, cell: nn.RNNBase, characters: int) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(characters, EMBEDDED), cell
        self.head = nn.Linear(cell.hidden_size * (1 + cell.bidirectional), characters)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.words(ids))[0])


GUIDES: dict[str, Any] = {
    "two LSTMs": lambda: nn.LSTM(EMBEDDED, 192, 2, batch_first=True),
    "GRU": lambda: nn.GRU(EMBEDDED, 256, batch_first=True),
    "two LSTMs, both ways": lambda: nn.LSTM(EMBEDDED, 128, 2, batch_first=True, bidirectional=True),
}


class Characters:
    """Batches of one guide's task: (ids_BT, wanted_BT), -100 where nothing is asked."""

    def __init__(self, restores: bool, small: bool) -> None:
        texts = documentation() if small else novels()
        read = "\n".join(text for title, text in texts.items() if title not in HELD_OUT)
        alphabet = sorted(set(read))
        self.known = {c: n + 1 for n, c in enumerate(alphabet)}  # 0: not told
        self.size, self.restores = len(alphabet) + 1, restores
        self.read, self.unread = self._ids(read), self._ids("\n".join(texts[title] for title in HELD_OUT))
        self.vowels = torch.tensor([False, *(c in "aeiou" for c in alphabet)])

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.known.get(c, UNKNOWN) for c in text])

    def batches(self, count: int, seed: int, held_out: bool = False) -> Iterator[Pair]:
        generator, text = torch.Generator().manual_seed(seed), self.unread if held_out else self.read
        for _ in range(count):
            starts = torch.randint(0, len(text) - TIME - 1, (BATCH,), generator=generator)
            ids_BT = torch.stack([text[start : start + TIME + 1] for start in starts])
            if not self.restores:
                yield ids_BT[:, :-1], ids_BT[:, 1:]
                continue
            ids_BT = ids_BT[:, 1:]
            hidden_BT = self.vowels[ids_BT] & (torch.rand(ids_BT.shape, generator=generator) < 0.5)
            yield ids_BT.masked_fill(hidden_BT, UNKNOWN), ids_BT.masked_fill(~hidden_BT, -100)


def documentation() -> dict[str, str]:
    """Where no novels are at hand: pages of Python's own."""
    from pydoc_data.topics import topics

    pages = sorted(topics)
    return {
        **{page: topics[page] for page in pages[2:20]},
        **dict(zip(HELD_OUT, (topics[page] for page in pages), strict=False)),
    }


def nats(logits_BTV: torch.Tensor, wanted_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), wanted_BT.flatten(), ignore_index=-100)


def trained(kind: str, data: Characters, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Reader(GUIDES[kind](), data.size)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for ids_BT, wanted_BT in data.batches(steps, seed):
        optimizer.zero_grad()
        nats(model(ids_BT), wanted_BT).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return model.eval()


@torch.no_grad()
def by_products(self: CellTarget, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """`CellTarget.prepare`, the choice made as for an MLP: by what the maps of the hidden states come to."""
    facts = part.cell
    assert facts is not None
    known, units = moments(facts.hidden(x_BTD) for x_BTD, _ in examples), facts.units
    read_OE = facts.read_by(self.width_out).weight_OI.split(units, 1)
    kept = []
    for number, (weights, own_OE) in enumerate(zip(facts.weights, read_OE, strict=True)):
        at_E = slice(number * units, (number + 1) * units)
        maps = torch.cat([weights.hidden_GEE, own_OE])
        kept.append(select_features(known.covariance_EE[at_E, at_E], maps, self.width))
    self._keep(facts, kept, known)


def bench(run: Run) -> None:
    for seed in run.seeds:
        for kind in run.settings["guides"]:
            data = Characters("both" in kind, run.settings["small"])
            guide = trained(kind, data, seed, run.settings["guide_steps"])
            given: dict[str, Any] = {
                "data": list(data.batches(run.settings["batches"], seed + 100)),
                "eval_data": list(data.batches(8, seed, held_out=True)),
                "inputs": lambda batch: {"ids": batch[0]}, "loss": lambda logits, batch: nats(logits, batch[1]),
                "progress": False,
            }  # fmt: skip
            for ratio in run.settings["ratios"]:
                one_size(run, seed, kind, guide, ratio, given)


def one_size(run: Run, seed: int, kind: str, guide: nn.Module, ratio: float, given: dict[str, Any]) -> None:
    target, steps = Target("narrow", ratio=ratio), run.settings["steps"]
    closed, after = Recipe.named("fast"), Recipe.named("default").model_copy(update={"steps": steps})
    off = {"closed_form": after.closed_form.model_copy(update={"enabled": False})}
    stages = {"start": closed, **({"trained": after} if ratio == run.settings["trained_at"] else {})}
    mocks = {
        OURS: nullcontext, PRODUCTS: lambda: mock.patch.object(CellTarget, "prepare", by_products),
        LARGEST: lambda: mock.patch.object(CellTarget, "prepare", TargetModule.prepare),
    }  # fmt: skip
    for way, mocked in mocks.items():
        for stage, recipe in stages.items():
            if run.wants(name := f"{kind}, {ratio:g}, {way}, {stage}", seed):
                with mocked():
                    report = told(guide, target, recipe.model_copy(update=off if way == LARGEST else {}), seed, given)
                add(run, name, seed, (kind, ratio, way, stage), report)
    if "trained" in stages and run.wants(name := f"{kind}, {ratio:g}, {SCRATCH}, trained", seed):
        rates = [
            thesean.baseline(guide, target, kind="scratch", learning_rate=rate, recipe=after, seed=seed, **given).report
            for rate in run.settings["rates"]
        ]
        add(run, name, seed, (kind, ratio, SCRATCH, "trained"), min(rates, key=lambda r: r.converted["loss"] or 0.0))


def add(run: Run, name: str, seed: int, about: tuple[str, float, str, str], report: Any) -> None:
    kind, ratio, way, stage = about
    run.add(
        name, seed, guide=kind, ratio=ratio, way=way, stage=stage, params=report.params, flops=report.flops,
        guide_loss=report.guide["loss"], **report.converted,
    )  # fmt: skip


def table(result: Result) -> str:
    """A row a guide and size: nats of each way, at the start and after the steps."""
    found: dict[tuple[str, float], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in result["cases"]:
        found.setdefault((row["guide"], row["ratio"]), {}).setdefault((row["way"], row["stage"]), []).append(row)
    columns = [*((way, "start") for way in (OURS, PRODUCTS, LARGEST))]
    columns += [(way, "trained") for way in (OURS, LARGEST, SCRATCH)]
    body = []
    for (kind, ratio), ways in found.items():
        rows = next(iter(ways.values()))
        cells = [f"{mean(ways[c], 'loss'):.3f}" if c in ways else "not measured" for c in columns]
        body.append(
            [kind, f"{ratio:g}", f"{rows[0]['params'] / 1000:.0f} k", f"{mean(rows, 'guide_loss'):.3f}", *cells]
        )
    heads = ["guide", "ratio", "parameters", "the guide's", *(f"{way}, {stage}" for way, stage in columns)]
    seeds, steps = len(result["seeds"]), result["settings"]["steps"]
    told = f"Nats a character of two held-out novels, means of {seeds} seeds; {steps} steps."
    return "\n".join([told, "", *markdown(heads, body, names=2)])


CASE = Case(
    question="What are units of a recurrent guide worth that are chosen, beside the largest ones and from scratch?",
    minutes=35,
    unit="nats",
    run=bench,
    settings={
        "guides": list(GUIDES), "ratios": [0.75, 0.5, 0.34], "trained_at": 0.5, "guide_steps": 1500, "batches": 16,
        "steps": 150, "rates": [1e-2, 3e-3], "small": False,
    },
    quick={
        "guides": ["GRU"], "ratios": [0.5], "trained_at": 0.5, "guide_steps": 2, "batches": 2, "steps": 2,
        "rates": [1e-3], "small": True,
    },
    seeds=(0, 1, 2),
    table=table,
    partial=True,
)  # fmt: skip
