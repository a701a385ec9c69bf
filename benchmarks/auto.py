"""Does choosing per part beat one target for all parts? The demo's language model at equal measured latency.

    python benchmarks/auto.py --out benchmarks/results/auto.json [--seeds 0 1 2] [--speedup 1.5]

Uniform plans give all parts the same target (the guide's own part where it doesn't fit). All of them and what "auto"
found are measured in onnxruntime in the same turns; a uniform plan competes when its latency is within the bound. Every
plan is then converted in the same number of steps on the same batches, and judged by its loss on held-out topics.
Runs that the file holds already are skipped, so an interrupted run continues.
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

import thesean
from text import Windows, corpus, held_out_windows
from thesean.deploy.latency import latency_of_models
from thesean.recipe import Recipe
from thesean.report import environment

STEPS, BATCH, LENGTH, CONTEXT = 150, 4, 256, 512

# One target for all parts. Ratios and layer counts are as fine as one would try by hand.
UNIFORM: dict[str, dict[str, Any]] = {
    "rnn": {"target": "rnn"},
    "gru": {"target": "gru"},
    "narrow to 3/4": {"target": thesean.Target("narrow", ratio=0.75)},
    "narrow to 1/2": {"target": thesean.Target("narrow", ratio=0.5)},
    "narrow to 1/4": {"target": thesean.Target("narrow", ratio=0.25)},
    "narrow to 1/8": {"target": thesean.Target("narrow", ratio=0.125)},
    "3 of 4 layers": {"target": "copy", "target_parts": 3},
    "2 of 4 layers": {"target": "copy", "target_parts": 2},
    "attention dropped": {"target": {"*attn": "identity", "*mlp": "keep"}, "granularity": "sublayer"},
    "MLPs dropped": {"target": {"*mlp": "identity", "*attn": "keep"}, "granularity": "sublayer"},
}
CANDIDATES: tuple[Any, ...] = (
    "keep",
    "identity",
    "rnn",
    *(thesean.Target("narrow", ratio=ratio) for ratio in (0.75, 0.5, 0.25, 0.125)),
)


def latencies(plans: dict[str, thesean.Plan], guide: torch.nn.Module, example: Any) -> dict[str, float]:
    """Milliseconds of a prefill of CONTEXT tokens, the guide's too, all in turns. Weights don't matter: untrained."""
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for name, plan in plans.items():
            converted = thesean.compile(guide, plan=plan, data=[example] * 2, recipe="fast", progress=False)
            files.setdefault("guide", converted.frontier[0].export(Path(folder) / "guide.onnx").path)
            files[name] = converted.export(Path(folder) / f"{len(files)}.onnx").path
            signature = converted.signature
        found = latency_of_models(files, signature, (CONTEXT,), 1, 40)
    prefill = {name: latency.prefill[CONTEXT] for name, latency in found.items()}
    return {name: value.median_ms for name, value in prefill.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/auto.json"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--speedup", type=float, default=1.5, help="of the guide's prefill: the bound on latency")
    options = parser.parse_args()
    torch.set_num_threads(1)

    from transformers import GPT2LMHeadModel

    folder = Path(__file__).resolve().parents[1] / "examples" / "guide"
    guide = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = held_out_windows(LENGTH)[::2]
    recipe = Recipe.named("default").model_copy(update={"steps": STEPS})
    budget = {"speedup": options.speedup, "context": CONTEXT}
    results: dict[str, Any] = {"runs": [], "searches": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())

    def write() -> None:
        results["environment"] = environment()
        results["budget"] = {**budget, "steps": STEPS, "batch": BATCH, "length": LENGTH}
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    uniform = {name: thesean.plan(guide, **how, example_inputs=held_out[0][0]) for name, how in UNIFORM.items()}
    for seed in options.seeds:
        data = Windows(corpus(held_out=False), batches=max(16, STEPS), batch=BATCH, length=LENGTH, seed=seed)
        common: dict[str, Any] = dict(
            data=data, eval_data=held_out, loss=thesean.cross_entropy, recipe=recipe, seed=seed, progress=False
        )
        if str(seed) not in results["searches"]:
            start = time.monotonic()
            # what plans are chosen by is not what they are judged by
            chosen_by = list(Windows(corpus(held_out=False), batches=4, batch=8, length=LENGTH, seed=1000))
            search = {**common, "eval_data": chosen_by}
            chosen = thesean.plan(guide, "auto", constraints=budget, candidates=CANDIDATES, **search)
            results["searches"][str(seed)] = {
                "plan": chosen.to_yaml(),
                "notes": list(chosen.notes),
                "seconds": round(time.monotonic() - start),
                "ms": latencies({**uniform, "auto": chosen}, guide, held_out[0]),
            }
            write()
        found = results["searches"][str(seed)]
        bound = found["ms"]["guide"] / options.speedup
        competing = {name: plan for name, plan in uniform.items() if found["ms"][name] <= bound}
        competing["auto"] = thesean.Plan.from_yaml(found["plan"])
        for name, plan in competing.items():
            if any(r["name"] == name and r["seed"] == seed for r in results["runs"]):
                continue
            start = time.monotonic()
            report = thesean.compile(guide, plan=plan, **common).report
            results["runs"].append(
                {
                    "name": name,
                    "seed": seed,
                    "loss": report.converted["loss"],
                    "guide": report.guide["loss"],
                    "ms": found["ms"][name],
                    "bound_ms": bound,
                    "params": report.params,
                    "seconds": round(time.monotonic() - start, 1),
                }
            )
            write()
            print(
                f"seed {seed}  {name:20s} loss {report.converted['loss']:.4f}  {found['ms'][name]:.2f} ms", flush=True
            )


if __name__ == "__main__":
    main()
