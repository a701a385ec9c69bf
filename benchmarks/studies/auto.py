"""Does choosing per part beat one target for all parts? The demo's language model at equal measured latency.

Uniform plans give all parts the same target (the guide's own part where it doesn't fit); "auto" chooses with its
default settings. All of them are measured in onnxruntime in the same turns of one run; a uniform plan competes where it
meets the bound, or is no slower than what "auto" found. Every competitor is then converted in the same number of steps
on the same batches, and judged by its loss on held-out topics, which the choice never saw.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx

import thesean
from benchmarks import language
from benchmarks.suite import Case, Result, Run
from examples.text import Windows, corpus
from thesean import Target
from thesean.deploy.export import export
from thesean.deploy.timing.latency import latency_of_models
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.capture import capture
from thesean.passes.graph.surgery import clone
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import bind_plan

# One target for all parts. Ratios and layer counts are as fine as one would try by hand.
UNIFORM: dict[str, dict[str, Any]] = {
    "rnn": {"target": "rnn"},
    "linear attention, window 64": {"target": Target("linear-attention", window=64)},
    **{name: {"target": name} for name in ("delta", "ssm", "mingru", "gru", "lstm", "elman", "conv", "reservoir")},
    **{f"{name}, whole blocks": {"target": Target(name, scope="part")} for name in ("gru", "mingru", "conv", "linear")},
    **{f"narrow to {n}/{d}": {"target": Target("narrow", ratio=n / d)} for n, d in ((3, 4), (1, 2), (1, 4), (1, 8))},
    **{f"{n} of 4 heads": {"target": Target("narrow-heads", ratio=n / 4)} for n in (3, 2, 1)},
    **{f"{n} of 4 layers": {"target": "copy", "target_parts": n} for n in (3, 2, 1)},
    "attention dropped": {"target": {"*attn": "identity", "*mlp": "keep"}, "granularity": "sublayer"},
    "MLPs dropped": {"target": {"*mlp": "identity", "*attn": "keep"}, "granularity": "sublayer"},
}


def latencies(
    plans: dict[str, thesean.Plan], guide: torch.nn.Module, example: torch.Tensor, context: int, repeats: int
) -> dict[str, float]:
    """Milliseconds of a prefill of `context` tokens, the guide's too, all in turns. Weights don't matter: untrained."""
    captured = capture(guide, example)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}

        def write(name: str, graph_module: fx.GraphModule) -> None:
            BoundPositions()(graph_module)
            files[name] = Path(folder) / f"{len(files)}.onnx"
            export(graph_module, captured.signature, files[name], train_length=64)
            print(f"exported {name}", flush=True)

        write("guide", clone(captured.graph_module))
        for name, plan in plans.items():
            write(name, build_hybrid(bind_plan(captured, plan)).graph_module)
        found = latency_of_models(files, captured.signature, (context,), 1, repeats)
    prefill = {name: latency.prefill[context] for name, latency in found.items()}
    return {name: value.median_ms for name, value in prefill.items() if value is not None}


def bench(run: Run) -> None:
    settings = run.settings
    guide = language.guide(settings["layers"])
    held_out = language.held_out(settings["length"], settings["every"])
    recipe = language.recipe(steps=settings["steps"])

    def common(seed: int) -> dict[str, Any]:
        data = language.windows(settings, seed)
        return dict(data=data, loss=thesean.cross_entropy, recipe=recipe, seed=seed, progress=False)

    # what plans are chosen by is not what they are judged by
    chosen_by = list(Windows(corpus(held_out=False), batches=4, batch=8, length=settings["length"], seed=1000))
    searches: list[dict[str, Any]] = list(run.details.get("searches", []))
    for seed in run.seeds:
        for speedup in settings["speedups"]:
            if any((s["seed"], s["speedup"]) == (seed, speedup) for s in searches):
                continue
            start = time.monotonic()
            budget = {"speedup": speedup, "context": settings["context"]}
            if settings["by_params"]:
                budget = {"params": round(sum(p.numel() for p in guide.parameters()) / speedup)}
            plan = thesean.plan(
                guide, "auto", constraints=budget, eval_data=chosen_by, candidates=settings["candidates"],
                **common(seed),
            )  # fmt: skip
            row = {"seed": seed, "speedup": speedup, "notes": list(plan.notes), "plan": plan.to_yaml()}
            searches.append(row | {"seconds": round(time.monotonic() - start)})
            run.keep(searches=searches)
            print(f"seed {seed}, {speedup:g} times: {plan.notes[0]}", flush=True)

    uniform = {name: UNIFORM[name] for name in settings["uniform"] or UNIFORM}
    plans = {name: thesean.plan(guide, **how, example_inputs=held_out[0][0]) for name, how in uniform.items()}
    for s in searches:
        plans[_name(s)] = thesean.Plan.from_yaml(s["plan"])
    if set(run.details.get("ms", {})) != {"guide", *plans}:
        run.keep(ms=latencies(plans, guide, held_out[0][0], settings["context"], settings["repeats"]))
    ms = run.details["ms"]
    for s in searches:
        seed, limit = s["seed"], max(ms["guide"] / s["speedup"], ms[_name(s)])
        for name in [*(n for n in uniform if ms[n] <= limit), _name(s)]:
            if not run.wants(name, seed):
                continue
            start = time.monotonic()
            report = thesean.compile(guide, plan=plans[name], eval_data=held_out, **common(seed)).report
            run.add(
                name,
                seed,
                loss=report.converted["loss"],
                guide=report.guide["loss"],
                params=report.params,
                seconds=round(time.monotonic() - start, 1),
            )


def _name(search: dict[str, Any]) -> str:
    return f"auto, {search['speedup']:g} times, seed {search['seed']}"


def table(result: Result) -> str:
    """For each bound: all plans that meet it, best first; the loss is the mean over seeds, with its range."""
    budget, ms = result["settings"], result["details"]["ms"]
    guide = result["cases"][0]["guide"]
    about = (
        f"Prefill of {budget['context']} tokens, batch 1; the guide takes {ms['guide']:.1f} ms and is at "
        f"{guide:.3f} nats. Each plan was converted in {budget['steps']} steps of {budget['batch']} x "
        f"{budget['length']} characters."
    )
    lines = [
        about,
        "",
        "| bound | plan | ms | loss | seeds | parameters |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for speedup in sorted({s["speedup"] for s in result["details"]["searches"]}):
        lines += _rows(result, speedup)
    return "\n".join(lines)


def _rows(result: Result, speedup: float) -> list[str]:
    ms = result["details"]["ms"]
    chosen = {_name(s) for s in result["details"]["searches"] if s["speedup"] == speedup}
    bound = ms["guide"] / speedup
    limit = max(bound, *(ms[name] for name in chosen))
    found: dict[str, list[dict[str, Any]]] = {}
    for run in result["cases"]:
        uniform = not run["name"].startswith("auto")
        if run["name"] in chosen or (uniform and ms[run["name"]] <= limit):
            found.setdefault(run["name"] if uniform else "**auto**", []).append(run)
    rows = []
    for name, runs in sorted(found.items(), key=lambda item: statistics.fmean(r["loss"] for r in item[1])):
        losses = [r["loss"] for r in runs]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        took = statistics.fmean(ms[r["name"]] for r in runs)
        params = statistics.fmean(r["params"] for r in runs)
        rows.append(
            f"| {bound:.1f} ms ({speedup:g}x) | {name} | {took:.1f} | {statistics.fmean(losses):.3f}{spread} | "
            f"{len(runs)} | {params / 1000:.0f} k |"
        )
    return rows


CASE = Case(
    question="Does choosing per part beat one target for all parts, at equal measured latency?",
    minutes=60,
    unit="nats a character",
    run=bench,
    settings={
        "steps": 150, "batch": 4, "length": 256, "context": 512, "repeats": 40, "every": 2, "layers": None,
        "speedups": [1.5], "candidates": None, "uniform": None, "by_params": False,
    },
    # a speed-up of microseconds may ask for nothing to be replaced: so many times fewer parameters instead
    quick={
        "steps": 2, "batch": 2, "length": 32, "context": 16, "repeats": 2, "every": 80, "layers": 1,
        "speedups": [1.5], "candidates": ["keep", "linear"], "uniform": ["linear, whole blocks"], "by_params": True,
    },
    seeds=(0, 1, 2),
    needs=("onnxruntime", "scipy", "transformers"),
    table=table,
)  # fmt: skip
