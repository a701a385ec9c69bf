"""What does a faster network lose, and where does it pay: the guide with its cache, every hybrid, "auto" at budgets.

The demo's language model. All are judged on the same held-out topics, in nats a character, and served side by side in
onnxruntime on one thread: a prefill, and one more token after it. Converted with `rnn`, whose stages give the hybrids,
and with the plans that "auto" finds at several speed-ups of a prefill, all in as many steps on the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import thesean
from benchmarks import language
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown
from examples.text import Windows, corpus
from thesean import TradeOffs
from thesean.choose.choose import UNMET


def conversions(guide: Any, settings: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """By name, `rnn` with all of its hybrids; and what is told of each: seconds, and of "auto" its plan's notes."""
    shared: dict[str, Any] = dict(
        data=language.windows(dict(settings), seed), loss=thesean.cross_entropy, seed=seed, progress=False,
        recipe=language.recipe(settings["recipe"], settings["steps"]),
    )  # fmt: skip
    held_out = language.held_out(settings["length"], settings["every"])
    start = time.monotonic()
    whole = thesean.compile(guide, "rnn", granularity="sublayer", eval_data=held_out, **shared)
    found: dict[str, Any] = {"rnn": whole.frontier}
    told: dict[str, Any] = {"rnn": {"seconds": round(time.monotonic() - start)}}
    if not settings["speedups"]:
        return found, told
    # what plans are chosen by is not what they are judged by
    chosen_by = list(Windows(corpus(held_out=False), batches=4, batch=8, length=settings["length"], seed=1000))
    budgets = [{"speedup": s, "context": settings["context"]} for s in settings["speedups"]]
    start = time.monotonic()
    plans = thesean.plan(guide, "auto", constraints=budgets, eval_data=chosen_by, **shared)
    told["auto"] = {"seconds": round(time.monotonic() - start)}
    for speedup, plan in zip(settings["speedups"], plans, strict=True):
        name = f"auto {speedup:g}x"
        told[name] = {"notes": list(plan.notes), "plan": plan.to_yaml()}
        if plan.replaced and not any(note.startswith(UNMET) for note in plan.notes):  # else the guide itself meets it
            start = time.monotonic()
            found[name] = thesean.compile(guide, plan=plan, eval_data=held_out, **shared)
            told[name]["seconds"] = round(time.monotonic() - start)
    return found, told


def measure(run: Run) -> None:
    settings = run.settings
    guide, (seed,) = language.guide(settings["layers"]), run.seeds
    networks, told = conversions(guide, settings, seed)
    run.keep(conversions=told)
    found = thesean.trade_offs(
        networks,
        data=language.held_out(settings["length"], settings["every"]),
        loss=thesean.cross_entropy,
        metric=thesean.accuracy,
        lengths=settings["lengths"],
        batches=settings["batches"],
        quantize=settings["quantize"],
        repeats=settings["repeats"],
    )
    for point in found:
        run.add(point.name, **{k: v for k, v in asdict(point).items() if k != "name"})
    run.keep(unit=found.unit, judged=found.judged, notes=list(found.notes))


def read(result: Result) -> TradeOffs:
    """The points of a result, with all that they can do."""
    details = result["details"]
    told = {key: details[key] for key in ("unit", "judged", "notes")}
    return TradeOffs.from_dict({"points": result["cases"], **told})


def table(result: Result) -> str:
    """A table a number of rows; a star where a point is on the Pareto front."""
    found, lines = read(result), list[str]()
    for batch in dict.fromkeys(b for _, _, b in found.places):
        heads, rows = found.table(batch)
        lines += [f"Batch {batch}:", "", *markdown(heads, rows), ""]
    how = f"\\* on the Pareto front of {found.quality}; {found.judged}. State and peak are of the longest sequence."
    return "\n".join([*(line.replace("*", "\\*") if line.startswith("|") else line for line in lines), how])


def picture(result: Result) -> str:
    """Loss against latency at the shortest and the longest sequence, as SVG."""
    return read(result).svg()


CASE = Case(
    question="What does a faster network lose, and from where on does it pay?",
    minutes=60,
    unit="nats a character, ms",
    run=measure,
    settings={
        "steps": 250, "batch": 4, "length": 256, "context": 512, "every": 2, "layers": None, "recipe": "default",
        "speedups": [1.25, 1.5, 2.0], "lengths": [64, 512, 2048, 8192], "batches": [1, 8], "quantize": [None, "int8"],
        "repeats": 20,
    },
    # "auto" takes half a minute, whatever it is asked for: the quick form of the case "auto" shows that it works
    quick={
        "steps": 2, "batch": 2, "length": 32, "context": 16, "every": 80, "layers": 1, "recipe": "fast", "speedups": [],
        "lengths": [8, 16], "batches": [1], "quantize": [None], "repeats": 1,
    },
    needs=("onnxruntime", "scipy", "transformers"),
    table=table,
    picture=picture,
)  # fmt: skip
