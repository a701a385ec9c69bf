"""Trained networks that install by name: what does a conversion lose at each budget, and what does its file win?

A sentence encoder, an image classifier and a speaker encoder, each to two other architectures: in closed form, and
then with a minute, ten and thirty of one core. Judged beside the guide on data that nothing was fitted on. Files in
float32 and with weights of eight bits run side by side on one thread, one example at a time and eight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import thesean
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown
from benchmarks.trained import images, sentences, voices
from benchmarks.trained.subject import Subject
from thesean.units import milliseconds

SUBJECTS: dict[str, Callable[[dict[str, Any]], Subject]] = {
    "all-MiniLM-L6": sentences.subject,
    "EfficientNet-Lite0": images.subject,
    "Resemblyzer": voices.subject,
}
CLOSED_FORM = "closed form"


def bench(run: Run) -> None:
    """Short budgets come first, over all networks; before the longest one the files of a network's conversions, which
    cost the same whatever they were trained. Where time is short, what is measured is the whole question once.
    """
    subject_of = cache(lambda name: SUBJECTS[name](run.settings))
    chosen = [name for name in SUBJECTS if not run.only or name.startswith(run.only)]
    made: dict[str, dict[str, thesean.Converted]] = {name: {} for name in chosen}
    budgets = [CLOSED_FORM, *run.settings["budgets"]]
    for name in chosen:
        if run.wants(f"{name}: guide"):
            subject = subject_of(name)
            run.add(f"{name}: guide", subject=name, target="guide", budget="", figures=subject.figures(subject.guide))
    for budget, name in product(budgets[:-1] or budgets, chosen):
        convert(run, name, subject_of(name), budget, made[name])
    served: dict[str, Any] = run.details.get("served", {})
    for name in chosen:
        if name not in served:
            subject = subject_of(name)
            unmade = [target for target in subject.targets if target not in made[name]]
            files = made[name] | {target: conversion(subject, target, CLOSED_FORM) for target in unmade}
            served[name] = costs(subject, files, run.settings)
            run.keep(served=served)
    for name in chosen:
        convert(run, name, subject_of(name), budgets[-1], {})


def convert(run: Run, name: str, subject: Subject, budget: str, made: dict[str, thesean.Converted]) -> None:
    """To each target in this budget, judged; what was `made` first of each is kept."""
    for target in subject.targets:
        if run.wants(f"{name}: {target}, {budget}"):
            converted = conversion(subject, target, budget)
            about: dict[str, Any] = {"subject": name, "target": target, "budget": budget}
            run.add(f"{name}: {target}, {budget}", **about, figures=subject.figures(converted))
            made.setdefault(target, converted)


def conversion(subject: Subject, target: str, budget: str) -> thesean.Converted:
    asked: dict[str, Any] = {"recipe": "fast"} if budget == CLOSED_FORM else {"budget": budget}
    wanted = subject.targets[target]
    asked |= {"data": subject.data, "eval_data": subject.chosen_by, "outputs": subject.outputs, "progress": False}
    return thesean.compile(subject.guide, wanted, **asked)


def costs(subject: Subject, made: dict[str, thesean.Converted], settings: dict[str, Any]) -> dict[str, Any]:
    """By file: milliseconds by batch, bytes, and what is lost in eight bits, by the outputs' divergence."""
    found = thesean.trade_offs(
        made,
        guide=subject.guide,
        data=next(iter(subject.judged.values())),
        outputs=subject.outputs,
        lengths=subject.lengths,
        batches=settings["rows"],
        quantize=(None, "int8"),
        repeats=settings["repeats"],
    )
    return {"unit": found.unit, "notes": list(found.notes), "points": found.to_dict()["points"]}


def table(result: Result) -> str:
    """One a network: its figures by budget, and its files' milliseconds by rows, which no budget changes."""
    lines = list[str]()
    left_out = [row["name"] for row in result["details"].get("left_out", ())]
    for name in SUBJECTS:
        rows = [row for row in result["cases"] if row["subject"] == name]
        if not rows:
            continue
        places = served_at(result, name)
        heads = [name, "", *rows[0]["figures"], *places]
        body = []
        for row in rows:
            figures = [f"{value:.3f}" for value in row["figures"].values()]
            times = [place.get(row["target"], "") for place in places.values()]
            body.append([row["target"], row["budget"], *figures, *times])
        for missing in (n for n in left_out if n.startswith(f"{name}: ")):
            told = missing.removeprefix(f"{name}: ").rsplit(", ", 1)
            body.append([*told, *["not measured"] * (len(heads) - len(told))])
        lines += [*markdown(heads, body, names=2), ""]
    return "\n".join(lines).rstrip()


def served_at(result: Result, name: str) -> dict[str, dict[str, str]]:
    """By what is told, at so many rows of the longest sequences: by target, in float32 and in eight bits."""
    points = result["details"].get("served", {}).get(name, {}).get("points", ())
    places: dict[str, dict[str, str]] = {}
    for point in points:
        longest = max((s["length"] or 0 for s in point["served"]), default=0)
        for place in point["served"]:
            if (place["length"] or 0) == longest and place["prefill"] is not None:
                form = "" if point["form"] == "float32" else f", {point['form']}"
                head = f"ms, {place['batch']} x {longest}{form}" if longest else f"ms, {place['batch']}{form}"
                places.setdefault(head, {})[point["name"].removesuffix(form)] = milliseconds(
                    place["prefill"]["median_ms"]
                )
        if point["divergence"] is not None and point["form"] != "float32":
            head = f"divergence, {point['form']}"
            places.setdefault(head, {})[point["name"].removesuffix(f", {point['form']}")] = f"{point['divergence']:.4f}"
        places.setdefault("MB", {})
        if point["form"] == "float32":
            places["MB"][point["name"]] = f"{point['file_bytes'] / 1e6:.1f}"
    return places


CASE = Case(
    question="Trained networks that install by name: what does a conversion lose at each budget, what does it win?",
    minutes=270,
    unit="cosine, share of examples, ms",
    run=bench,
    settings={
        "batches": 64, "judged": 12, "budgets": ["60s", "10min", "30min"], "rows": [1, 8], "size": 224, "repeats": 20,
    },
    quick={"batches": 2, "judged": 1, "budgets": [], "rows": [1], "repeats": 1},
    quick_only=("Resemblyzer",),
    needs=("onnxruntime", "transformers", "sklearn", "matplotlib"),
    table=table,
    partial=True,
)  # fmt: skip
