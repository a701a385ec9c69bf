"""A figure that a document says in a sentence is in the committed results."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@cache
def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def cases(name: str) -> list[dict[str, Any]]:
    """What was measured, a dict with a name each. Until all results have one shape: "cases"."""
    found = next(results(name)[key] for key in ("rows", "runs", "conversions", "cases") if key in results(name))
    if isinstance(found, dict):
        found = [{"name": key, **values} for key, values in found.items()]
    return [{"name": case.get("case"), **case} for case in found]


def settled(name: str, key: str) -> Any:
    """A setting or a detail of a result, wherever its shape keeps it."""
    found = results(name)
    places = (found, *(found.get(place, {}) for place in ("settings", "budget", "details")))
    return next(place[key] for place in places if key in place)


def case(file: str, name: str) -> dict[str, Any]:
    return next(c for c in cases(file) if c["name"] == name)


def demo(name: str) -> str:
    return f"{case('demo', name)['loss']:.4f}"


def run(name: str, file: str = "recipes", stage: int | None = None) -> str:
    """The mean over seeds of a run's loss, at the end or after a stage."""
    found = [c for c in cases(file) if c["name"] == name]
    assert found, name
    return f"{fmean(c['loss'] if stage is None else c['stages'][stage] for c in found):.3f}"


def best(name: str, cell: str = "linear-attention") -> str:
    """The lowest loss over the learning rates that were tried."""
    names = {c["name"] for c in cases("recipes") if c["name"].startswith(f"{name} {cell},")}
    assert len(names) == 3
    return min(map(run, names))


def method() -> list[str]:
    auto, copied = case("minilm", "auto"), "cell linear-attention"
    kept = "fast linear-attention, copied output kept"
    return [
        f"at {case('demo', 'converted')['steps']} steps each: converted {demo('converted')} nats per character",
        f"from scratch {demo('scratch')}, distilled {demo('distillation')}; the guide is at {demo('guide')}",
        f"one guide at {cases('recipes')[0]['guide']:.3f} nats, {settled('recipes', 'steps')} steps",
        f"linear attention ends at {run(copied)}; from scratch, at the best of three rates,",
        f"it ends at {best('scratch')}, and distilled at {best('distillation')}",
        f"lstm ends at {run('cell lstm')}, elman at {run('cell elman')}, gru at {run('cell gru')}",
        f"and mingru at {run('cell mingru')}",
        f"the last hybrid is at {run('no alignment', stage=-1)} before fine-tuning instead of {run(copied, stage=-1)}",
        f"and ends at {run('no alignment')}",
        f"as in the paper, ends at {run('paper')}",
        f"{run('fast linear-attention')} with memories from 1/3 token to 64",
        f"{run('fast linear-attention, long memories, W = 1')} with long ones",
        f"{run('no distillation')} without distillation, {run('no hidden states')} without hidden states",
        f"elman from scratch at {best('scratch', 'elman')}, and gru at {best('scratch', 'gru')}",
        f"{run('fast linear-attention')} instead of {run(kept)} without a gradient",
        f"a cosine of {auto['closed form']['cosine']:.3f} before, {auto['tuned']['cosine']:.3f} after",
        f'after {settled("minilm", "steps")} steps, for what "auto" chose',
    ]


def window_and_similarity() -> list[str]:
    layers = case("similarity", "12 x 12 layers, features, n=256 p=2048")
    faster = layers["times_faster"]
    errors = settled("similarity", "largest_error_by_offset")["300"]
    return [
        f"the guide is at {cases('window')[0]['guide']:.3f}",
        f"in place of all attentions is at {run('fast, no window', 'window')}",
        f"(`window=64`) it is at {run('fast, window 64', 'window')}",
        f"they are at {run('100 steps, no window', 'window')} and {run('100 steps, window 64', 'window')}",
        f"take {layers['times']['thesean']['median_ms']:.1f} ms, {faster['H K H']:g} times less than by H K H",
        f"and {faster['pytorch-cka']:g} times less than pytorch-cka",
        f"the largest error of CKA is {errors['thesean, cka']:.1e}; by H K H it is {errors['H K H']:g}",
    ]


def default_recipe() -> list[str]:
    fast, copied = "linear-attention, fast", "cell linear-attention"
    kept, last = "fast linear-attention, copied output kept", run(copied, stage=-1)
    more, usual = run("linear-attention, best", "best"), run("linear-attention, default", "best")
    return [
        f"`best`, with five times as many, ends at {more} and not at {usual}",
        f"{run(fast + ', 64 batches', 'best')} and not {run(fast, 'best')} without a gradient",
        f"{run('fast linear-attention')} and not {run(kept)} without a gradient",
        f"ends at {run(copied)}; progressive at {run('schedule progressive')}, joint at {run('schedule joint')}",
        f"progressive, {run('schedule progressive', stage=-1)} after the last stage",
        f"by CKA {run('measure cka, progressive', stage=-1)}",
        f"without it {run('no alignment', stage=-1)} and not {last} before fine-tuning, and {run('no alignment')} at",
        f"without it {run('no distillation')} at the end, with it {run(copied)}",
    ]


def fast_recipe() -> list[str]:
    fast = [c for c in cases("best") if c["name"] == "linear-attention, fast"]
    return [
        f"{run('linear-attention, fast', 'best')} nats a character, in {fmean(c['seconds'] for c in fast):.1f} s",
        f"beside it at {run('fast, window 64', 'window')}",
        f"the guide is at {cases('window')[0]['guide']:.3f}",
    ]


def best_recipe() -> list[str]:
    more, usual = run("linear-attention, best", "best"), run("linear-attention, default", "best")
    return [f"ends at {more} nats a character and not at {usual}"]


@pytest.mark.parametrize(
    ("document", "sentences"),
    [
        ("docs/method.md", method),
        ("docs/results.md", window_and_similarity),
        ("thesean/recipes/default.yaml", default_recipe),
        ("thesean/recipes/fast.yaml", fast_recipe),
        ("thesean/recipes/best.yaml", best_recipe),
    ],
)
def test_the_sentences_figures_are_the_committed_ones(document: str, sentences: Any):
    text = " ".join((ROOT / document).read_text(encoding="utf-8").replace("#", "").split())
    for sentence in sentences():
        assert sentence in text
