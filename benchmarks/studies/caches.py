"""What does a smaller cache cost before anything trains? Merged heads of keys, a latent, a window, solved.

On the demo's guide, and on the rotary one of rotary.py, whose four heads share two of keys. "mean": neighbours' heads
are averaged (Ainslie et al. 2023), and what follows is solved as in any conversion. A row's `cache` is
how many numbers a token adds to the state of one layer (guides: 256 and 128), or how many tokens that state holds.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import thesean
from benchmarks import language
from benchmarks.studies.rotary import STUDY
from benchmarks.suite import Case, Result, Run

Target = thesean.Target
_HEAD = 32  # width of a head of either guide
TARGETS: dict[str, dict[str, thesean.Target]] = {
    "demo": {
        **{f"gqa, {n} heads": Target("gqa", kv_heads=n) for n in (2, 1)},
        **{f"gqa, {n} heads, mean": Target("gqa", kv_heads=n, merge="mean") for n in (2, 1)},
        **{f"mla, rank {n}": Target("mla", rank=n) for n in (128, 64, 32)},
        **{f"sliding, window {n}": Target("sliding", window=n) for n in (64, 16)},
    },
    "rotary": {
        "gqa, 1 heads": Target("gqa", kv_heads=1),
        "gqa, 1 heads, mean": Target("gqa", kv_heads=1, merge="mean"),
        **{f"mla, rank {n}": Target("mla", rank=n) for n in (128, 64, 32)},
        **{f"sliding, window {n}": Target("sliding", window=n) for n in (64, 16)},
    },
}


def measure(run: Run) -> None:
    settings = run.settings
    held_out = language.held_out(settings["length"], settings["every"])
    guides: dict[str, nn.Module] = {}
    for guide, targets in TARGETS.items():
        for name, target in targets.items():
            for seed in run.seeds:
                if not run.wants(f"{guide}: {name}", seed):
                    continue
                if guide not in guides:
                    guides[guide] = STUDY.guide(settings) if guide == "rotary" else language.guide(settings["layers"])
                found = language.convert(
                    guides[guide], settings, held_out, seed, language.recipe("fast"), target=target
                )
                run.add(f"{guide}: {name}", seed, cache=cache(target), **found)


def cache(target: thesean.Target) -> str:
    """What a token adds, or what there is in all."""
    options: dict[str, Any] = target.options
    if target.name == "gqa":
        return f"{2 * options['kv_heads'] * _HEAD} a token"
    return f"{options['rank']} a token" if target.name == "mla" else f"{options['window']} tokens and 4"


def table(result: Result) -> str:
    cases = result["cases"]
    lines = ["Nats a character; median of the seeds.", ""]
    lines += ["| guide and target | cache | loss | lowest | highest | guide |", "|---|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(c["name"] for c in cases):
        rows = [c for c in cases if c["name"] == name]
        losses = sorted(c["loss"] for c in rows)
        told = " | ".join(f"{x:.4f}" for x in (losses[len(losses) // 2], losses[0], losses[-1], rows[0]["guide"]))
        lines.append(f"| {name} | {rows[0]['cache']} | {told} |")
    return "\n".join(lines)


CASE = Case(
    question="What does a smaller cache cost before anything trains?",
    minutes=12,
    unit="nats a character",
    run=measure,
    seeds=(0, 1, 2),
    settings={"steps": 0, "batch": 4, "length": 256, "every": 4, "layers": 4, "width": 128, "guide_steps": 1500},
    quick={"batch": 2, "length": 32, "every": 80, "layers": 1, "width": 16, "guide_steps": 2},
    quick_only=("demo: gqa, 2 heads", "demo: mla, rank 64"),
    needs=("transformers",),
    table=table,
)
