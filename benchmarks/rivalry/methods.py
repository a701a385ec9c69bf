"""Who meets whom: each rival with its start and its training, and what Thesean is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import thesean
from benchmarks.rivalry import students, train
from benchmarks.rivalry.blocks import Layout
from benchmarks.rivalry.students import Student
from benchmarks.rivalry.subjects import Batches, Subject

# Batches that starts are fitted on
CALIBRATION = 64

Start = Callable[[Subject, Batches], Student]


@dataclass(frozen=True)
class Rival:
    """A published method. `shape`: which of the timed architectures it is."""

    shape: str
    start: Start
    objective: train.Objective = train.outputs
    training: Callable[..., tuple[Student, float]] = train.train


@dataclass(frozen=True)
class Sizes:
    """What meets the bound: blocks, heads with neurons, attentions that stay."""

    blocks: int
    heads: int
    neurons: int  # beside fewer heads
    alone: int  # neurons, all heads kept
    attentions: int


def rivals(sizes: Sizes) -> dict[str, Rival]:
    """Name -> method, all at the same latency."""

    def few(start: Callable[[Subject, Batches, int], Student]) -> Start:
        return lambda subject, batches: start(subject, batches, sizes.blocks)

    def copied(subject: Subject, _: Batches) -> Student:
        return students.copied(subject, sizes.blocks)

    def attentions(subject: Subject, batches: Batches) -> Student:
        kept = students.attentions_by_return(subject, batches[:4])[: sizes.attentions]
        return students.silenced(subject, kept)

    return {
        "copied layers (DistilBERT)": Rival("blocks", copied, train.outputs_and_last_state),
        "ShortGPT": Rival("blocks", few(students.least_influence)),
        "ReplaceMe": Rival("blocks", few(students.replaced_by_a_map)),
        "BERT-of-Theseus": Rival("blocks", few(train.first_of_groups), training=train.swap),
        "FitNets": Rival("blocks", copied, train.hints_then_outputs),
        "logit distillation, copied layers": Rival("blocks", copied),
        "logit distillation, random weights": Rival(
            "blocks", lambda subject, _: students.random_weights(subject, sizes.blocks)
        ),
        "Minitron-like width pruning": Rival(
            "pruned", lambda subject, batches: students.narrowed(subject, batches, sizes.heads, sizes.neurons)
        ),
        "KL-guided attentions": Rival("attentions", attentions),
    }


def ours(layout: Layout, sizes: Sizes) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> shape, and what `thesean.compile` is asked for, or `language.recipe`; without a plan of "auto"."""
    return {
        "ours: narrow, MLPs alone": ("narrow", narrow(layout, None, sizes.alone)),
        "ours: narrow, heads and MLPs": ("narrow both", narrow(layout, sizes.heads, sizes.neurons)),
        # on as much data as the rivals' starts are fitted on: a recipe reads 16 batches unless it is told otherwise
        f"ours: narrow, heads and MLPs, {CALIBRATION} batches": (
            "narrow both",
            {**narrow(layout, sizes.heads, sizes.neurons), "closed_form__batches": CALIBRATION},
        ),
        "ours: copy": ("blocks", {"target": "copy", "target_parts": sizes.blocks}),
    }


def narrow(layout: Layout, heads: int | None, neurons: int) -> dict[str, Any]:
    """Fewer neurons in every MLP, and fewer heads in every attention where a number is given."""
    mlps = thesean.Target("narrow", width=neurons)
    if heads is None:
        return {"target": mlps, "granularity": "sublayer"}
    attentions, perceptrons = layout.globs
    given = {attentions: thesean.Target("narrow-heads", heads=heads), perceptrons: mlps}
    return {"target": given, "granularity": "sublayer"}
