"""What does a softmax window beside linear attention buy, and what does it cost? On the demo's language model.

    python benchmarks/window.py --out benchmarks/results/window.json [--only NAME ...] [--seed 0]
    python benchmarks/window.py --latency

Losses are nats per held-out character (a quarter of the held-out windows), in closed form alone and after 100 steps of
4 x 256 characters, which is the guide's context. "memories a to b": how many tokens past the window the heads remember
at the start; the defaults otherwise. "gentle": no alignment, learning rate 5e-4. --latency times the exported files
instead, one thread, and writes to the same file. Runs that the file holds already are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch

import thesean
from benchmarks import recipes
from text import held_out_windows
from thesean.deploy.timing.latency import latency_of_models
from thesean.report import environment

ROOT = Path(__file__).resolve().parents[1]
STEPS = 100
WINDOWS = (None, 16, 32, 64)
LONG, SHORT = (90.0, 1100.0), (1 / 3, 64.0)
CONTEXTS = (64, 512)


def target(window: int | None, **options: Any) -> thesean.Target:
    if window is not None:
        options["window"] = window
    return thesean.Target("linear-attention", **options)


def experiments() -> dict[str, dict[str, Any]]:
    """Name -> arguments of `recipes.run`."""
    runs: dict[str, dict[str, Any]] = {}
    for window in WINDOWS:
        name = "no window" if window is None else f"window {window}"
        runs[f"fast, {name}"] = {"target": target(window), "recipe": recipes.recipe("fast")}
        runs[f"{STEPS} steps, {name}"] = {"target": target(window), "recipe": recipes.recipe(steps=STEPS)}
    variants: dict[str, Any] = {
        "fast, no window, memories 90 to 1100, W = 2": target(None, memory=LONG, sharpness=2.0),
        "fast, window 16, memories 1/3 to 64": target(16, memory=SHORT),
        "fast, window 16, W = 1": target(16, sharpness=1.0),
        "fast, window 64, memories 1/3 to 64": target(64, memory=SHORT),
    }
    # where the closed form ends near the guide, the default rate first leads away from it
    gentle = recipes.recipe(
        steps=STEPS, alignment__share=0.0, alignment__schedule="none", fine_tuning__learning_rate=5e-4
    )
    for window in WINDOWS[1:]:
        runs[f"{STEPS} gentle steps, window {window}"] = {"target": target(window), "recipe": gentle}
    return runs | {name: {"target": chosen, "recipe": recipes.recipe("fast")} for name, chosen in variants.items()}


def latency(model: torch.nn.Module, held_out: list[Any]) -> dict[str, Any]:
    """Milliseconds in onnxruntime of a prefill and of one more token, by window; weights in closed form."""
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        for window in WINDOWS:
            converted = thesean.compile(
                model, target(window), data=held_out[:1], recipe="fast", granularity="sublayer", progress=False,
                loss=thesean.cross_entropy,
            )  # fmt: skip
            name = "no window" if window is None else f"window {window}"
            paths[name] = converted.export(Path(folder) / f"{window}.onnx").path
        found = latency_of_models(paths, converted.signature, contexts=CONTEXTS)
    return {name: asdict(figures) for name, figures in found.items()}


def write(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) if path.exists() else {"runs": []}
    budget = {"steps": STEPS, "batch": recipes.BATCH, "length": recipes.LENGTH}
    path.parent.mkdir(parents=True, exist_ok=True)
    document |= {"budget": budget, "environment": environment(), **changes}
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/window.json"))
    parser.add_argument("--only", nargs="*", help="names of experiments, or beginnings of names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(ROOT / "examples" / "guide", dtype=torch.float32).eval()
    held_out = held_out_windows(recipes.LENGTH)[::4]
    if options.latency:
        found = latency(model, held_out)
        write(options.out, latency=found)
        for name, figures in found.items():
            medians = {"prefill": figures["prefill"], "token": figures["token"]}
            print(name, {k: {c: round(v["median_ms"], 3) for c, v in row.items()} for k, row in medians.items()})
        return
    for name, arguments in experiments().items():
        done = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
        if options.only and not name.startswith(tuple(options.only)):
            continue
        if any(r["name"] == name and r["seed"] == options.seed for r in done):
            continue
        row = {"name": name, "seed": options.seed, **recipes.run(model, held_out, options.seed, **arguments)}
        write(options.out, runs=[*done, row])
        print(f"{name:48s} loss {row['loss']:.4f}  guide {row['guide']:.4f}  {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
