"""How rivals and ours are made, measured and judged on one guide: a row a method and seed."""

from __future__ import annotations

import time
from typing import Any

import thesean
from benchmarks.language import recipe as recipe_of
from benchmarks.rivalry import timing
from benchmarks.rivalry.methods import CALIBRATION, Rival, Sizes, ours, rivals
from benchmarks.rivalry.subjects import Subject, far, judge
from benchmarks.suite import Run


def meet(run: Run, subject: Subject) -> None:
    """All methods at one latency, one seed after another."""
    sizes = _sized(run, subject)
    names = timing.names_of(sizes)
    for seed in run.seeds:
        asked = ours(subject.layout, sizes)
        if "plan" in run.details:
            asked = {"ours: auto": ("auto", {"plan": thesean.Plan.from_yaml(run.details["plan"])})} | asked
        for name, (shape, arguments) in asked.items():
            if run.wants(name, seed):
                run.add(name, seed, **_own(subject, arguments, seed), shape=names[shape])
        for name, rival in rivals(sizes).items():
            if run.wants(name, seed):
                run.add(name, seed, **_meet(run, subject, name, rival, seed, names))


def _sized(run: Run, subject: Subject) -> Sizes:
    """What "auto" chooses, what everything takes, and the sizes that follow; measured once."""
    settings, data = run.settings, subject.data(0)
    if settings["auto"] and "plan" not in run.details:
        start, clock = time.process_time(), time.monotonic()
        chosen = thesean.plan(
            subject.guide, "auto", constraints={"speedup": subject.speedup, "context": subject.context}, data=data,
            eval_data=subject.chosen_by, progress=False, **subject.compile,
        )  # fmt: skip
        print(chosen, flush=True)
        took = {"search_cpu_s": time.process_time() - start, "search_s": time.monotonic() - clock}
        run.keep(plan=chosen.to_yaml(), notes=list(chosen.notes), **took)
    if "ms" not in run.details:
        made = timing.architectures(subject, settings, data)
        if "plan" in run.details:
            made["auto"] = thesean.Plan.from_yaml(run.details["plan"])
        ms, quantised = timing.timed(subject, made, data, settings["repeats"])
        params = sum(p.numel() for p in subject.guide.parameters())
        told = {"steps": subject.steps, "speedup": subject.speedup, "context": subject.context}
        run.keep(ms=ms, int8=quantised, guide=_figures(subject, subject.guide), params=params, **told)
    return timing.sizes_within(subject, run.details["ms"], settings)


def _figures(subject: Subject, model: Any) -> dict[str, dict[str, float]]:
    return {domain: judge(subject, model, batches) for domain, batches in subject.judged.items()}


def _meet(run: Run, subject: Subject, name: str, rival: Rival, seed: int, names: dict[str, str]) -> dict[str, Any]:
    """One rival: its start, and the best of the rates; of later seeds at the rate that was the first one's best."""
    data, start = subject.data(seed), time.process_time()
    student = rival.start(subject, data[:CALIBRATION])
    row: dict[str, Any] = {"start_cpu_s": time.process_time() - start, "start": _figures(subject, student.model)}
    first = next((r for r in run.rows if r["name"] == name), None)
    rates = run.settings["rates"] if first is None else [first["rate"]]
    tried: dict[str, float] = {}
    for rate in rates:
        trained, seconds = rival.training(subject, student, rival.objective, data, rate, seed)
        tried[str(rate)] = far(subject, trained.model, subject.chosen_by)
        if tried[str(rate)] <= min(tried.values()):
            row |= {"rate": rate, "cpu_s": seconds, "tuned": _figures(subject, trained.model)}
    params = sum(p.numel() for p in student.model.parameters())
    return row | {"tried": tried, "params": params, "shape": names[rival.shape]}


def _own(subject: Subject, arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """`thesean.compile` as it comes, in closed form and in as many steps as the rivals take."""
    settings = {name: value for name, value in arguments.items() if "__" in name}
    common: dict[str, Any] = dict(data=subject.data(seed), eval_data=subject.chosen_by, seed=seed, progress=False)
    common |= {**subject.compile, **{name: value for name, value in arguments.items() if name not in settings}}
    row: dict[str, Any] = {}
    recipes = {"start": recipe_of("fast", **settings), "tuned": recipe_of(steps=subject.steps, **settings)}
    for stage, recipe in recipes.items():
        start = time.process_time()
        converted = thesean.compile(subject.guide, recipe=recipe, **common)
        row["start_cpu_s" if stage == "start" else "cpu_s"] = time.process_time() - start
        row[stage] = _figures(subject, converted)
    return row | {"params": converted.report.params, "told": list(converted.report.notes)}
