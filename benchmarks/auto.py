"""Does choosing per part beat one target for all parts? The demo's language model at equal measured latency.

    python benchmarks/auto.py --out benchmarks/results/auto.json [--seeds 0 1 2] [--speedups 1.5 2]

Uniform plans give all parts the same target (the guide's own part where it doesn't fit); "auto" chooses with its
default settings. All of them are measured in onnxruntime in the same turns of one run; a uniform plan competes where it
meets the bound, or is no slower than what "auto" found. Every competitor is then converted in the same number of steps
on the same batches, and judged by its loss on held-out topics, which the choice never saw. What the file holds already
is not done again, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from torch import fx

import thesean
from text import Windows, corpus, held_out_windows
from thesean import Target
from thesean.deploy.export import export
from thesean.deploy.timing.latency import latency_of_models
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.capture import capture
from thesean.passes.graph.surgery import clone
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import bind_plan
from thesean.recipe import Recipe
from thesean.report import environment

STEPS, BATCH, LENGTH, CONTEXT, REPEATS = 150, 4, 256, 512, 40

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


def latencies(plans: dict[str, thesean.Plan], guide: torch.nn.Module, example: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a prefill of CONTEXT tokens, the guide's too, all in turns. Weights don't matter: untrained."""
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
        found = latency_of_models(files, captured.signature, (CONTEXT,), 1, REPEATS)
    prefill = {name: latency.prefill[CONTEXT] for name, latency in found.items()}
    return {name: value.median_ms for name, value in prefill.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/auto.json"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--speedups", nargs="*", type=float, default=[1.5, 2.0], help="the bounds: of the guide's prefill"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)

    from transformers import GPT2LMHeadModel

    folder = Path(__file__).resolve().parents[1] / "examples" / "guide"
    guide = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = held_out_windows(LENGTH)[::2]
    recipe = Recipe.named("default").model_copy(update={"steps": STEPS})
    results: dict[str, Any] = {"searches": [], "ms": {}, "runs": []}
    if options.out.exists():
        results = json.loads(options.out.read_text())

    def write() -> None:
        results["environment"] = environment()
        results["budget"] = {"steps": STEPS, "batch": BATCH, "length": LENGTH, "context": CONTEXT}
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    def common(seed: int) -> dict[str, Any]:
        data = Windows(corpus(held_out=False), batches=max(16, STEPS), batch=BATCH, length=LENGTH, seed=seed)
        return dict(data=data, loss=thesean.cross_entropy, recipe=recipe, seed=seed, progress=False)

    # what plans are chosen by is not what they are judged by
    chosen_by = list(Windows(corpus(held_out=False), batches=4, batch=8, length=LENGTH, seed=1000))
    for seed in options.seeds:
        for speedup in options.speedups:
            if any((s["seed"], s["speedup"]) == (seed, speedup) for s in results["searches"]):
                continue
            start = time.monotonic()
            budget = {"speedup": speedup, "context": CONTEXT}
            plan = thesean.plan(guide, "auto", constraints=budget, eval_data=chosen_by, **common(seed))
            row = {"seed": seed, "speedup": speedup, "notes": list(plan.notes), "plan": plan.to_yaml()}
            results["searches"].append(row | {"seconds": round(time.monotonic() - start)})
            write()
            print(f"seed {seed}, {speedup:g} times: {plan.notes[0]}", flush=True)

    plans = {name: thesean.plan(guide, **how, example_inputs=held_out[0][0]) for name, how in UNIFORM.items()}
    for s in results["searches"]:
        plans[_name(s)] = thesean.Plan.from_yaml(s["plan"])
    if set(results["ms"]) != {"guide", *plans}:
        results["ms"] = latencies(plans, guide, held_out[0][0])
        write()
    ms = results["ms"]
    for s in results["searches"]:
        bound = ms["guide"] / s["speedup"]
        limit = max(bound, ms[_name(s)])
        for name in [*(n for n in UNIFORM if ms[n] <= limit), _name(s)]:
            seed = s["seed"]
            if any((r["name"], r["seed"]) == (name, seed) for r in results["runs"]):
                continue
            start = time.monotonic()
            report = thesean.compile(guide, plan=plans[name], eval_data=held_out, **common(seed)).report
            results["runs"].append(
                {
                    "name": name,
                    "seed": seed,
                    "loss": report.converted["loss"],
                    "guide": report.guide["loss"],
                    "params": report.params,
                    "seconds": round(time.monotonic() - start, 1),
                }
            )
            write()
            print(f"{seed}  {name:32s} loss {report.converted['loss']:.4f}  {ms[name]:.2f} ms", flush=True)


def _name(search: dict[str, Any]) -> str:
    return f"auto, {search['speedup']:g} times, seed {search['seed']}"


if __name__ == "__main__":
    main()
