"""What does a learning rate cost that is given up early, and what does that buy?

Nine conversions of four guides: the demo's language model and digits convnet, a small vision transformer on the digits,
and all-MiniLM-L6 (left out where not installed). Each in closed form, and from there with the default recipe at few
steps and at more, the rate found as it is, and with the patience of before: 15 % of the steps left, ten at least. The
same steps, data and seeds. Told is the loss on held-out data, or without labels the divergence from the guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

import thesean
from benchmarks import language
from benchmarks.studies.starts import Conversion, of_digits, of_language_model
from benchmarks.suite import BenchmarkError, Case, Result, Run
from benchmarks.tables import markdown, mean_and_ends, unmeasured

PATIENT, FOUND = "15 % patience", "as it is"


def patient(left: int) -> int:
    """As long as a rate was tried for before it made room for the next one."""
    return max(10, round(0.15 * left))


def conversions(run: Run, seed: int) -> Iterator[Conversion]:
    """Other seeds are told of the same in another order, or of other texts."""
    yield from of_digits(run.settings, seed)
    for name, model, told in of_language_model(run.settings, seed):
        yield name, model, told
    yield "language model -> rnn, whole blocks", model, {**told, "target": "rnn", "granularity": "block"}
    from benchmarks.studies import minilm

    try:
        encoder, sentences, others = minilm.pretrained()
    except BenchmarkError:
        return
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed)).tolist()
    words = {"data": [sentences[k] for k in order], "eval_data": others[:4], "granularity": "sublayer"}
    yield "MiniLM -> narrow-heads", encoder, {"target": "narrow-heads", **words}


# What of fine_tune.py is another in each
WAYS: dict[str, dict[str, Any]] = {PATIENT: {"patience": patient}, FOUND: {}}


def bench(run: Run) -> None:
    beside(run, WAYS)


def beside(run: Run, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Each conversion in closed form, and at each budget in these ways."""
    for seed in run.seeds:
        for (name, model, told), steps in itertools.product(conversions(run, seed), (0, *run.settings["budgets"])):
            for way in ways if steps else ("closed form",):
                if not run.wants(f"{name}, {steps} steps, {way}", seed):
                    continue
                recipe, changed = language.recipe("default" if steps else "fast", steps or None), ways.get(way)
                with patch.multiple("thesean.distill.fine_tune", **changed) if changed else nullcontext():
                    report = thesean.compile(model, **told, recipe=recipe, seed=seed, progress=False).report
                kind = "divergence" if report.converted["loss"] is None else "loss"
                rates = [curve.learning_rate for curve in report.curves if curve.phase == "fine-tune" and curve.kept]
                run.add(
                    f"{name}, {steps} steps, {way}", seed, conversion=name, steps=steps, way=way, kind=kind,
                    value=report.converted[kind], guide=report.guide[kind], rates=rates,
                    seconds=round(report.seconds, 1),
                )  # fmt: skip


def table(result: Result) -> str:
    return table_of(result, list(WAYS))


def table_of(result: Result, ways: Sequence[str]) -> str:
    """A conversion at so many steps a row; means over seeds, lowest and highest, and the rates that gained."""
    cases, heads = result["cases"], ["held out", "steps", "guide", "closed form", *ways, "rates that gained"]
    body = []
    for name, steps in dict.fromkeys((case["conversion"], case["steps"]) for case in cases if case["steps"]):
        of = {
            way: [c for c in cases if c["conversion"] == name and (c["steps"], c["way"]) == at]
            for way, at in {"closed form": (0, "closed form"), **{way: (steps, way) for way in ways}}.items()
        }
        cells = [mean_and_ends([c["value"] for c in rows]) for rows in of.values()]
        last = of[ways[-1]]
        gained = ", ".join(f"{rate:g}" for rate in sorted({r for c in last for r in c["rates"]}, reverse=True))
        guide = next(c["guide"] for rows in of.values() for c in rows)
        body.append([name, str(steps), f"{guide:.4f}", *cells, gained or ("none" if last else "-")])
    return "\n".join([*markdown(heads, body), *unmeasured(result)])


CASE = Case(
    question="What does a rate cost that is given up early, and what does it buy?",
    minutes=80,
    unit="nats of held-out data, or divergence",
    run=bench,
    settings={
        "budgets": [30, 100],
        "steps": 100,
        "batch": 4,
        "length": 256,
        "every": 8,
        "layers": None,
        "guide_steps": 300,
    },
    quick={"budgets": [2], "steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1, "guide_steps": 2},
    quick_only=("language model -> gru", "digits convnet -> mlp"),
    seeds=(0, 1, 2),
    needs=("transformers", "sklearn"),
    table=table,
    partial=True,
)
