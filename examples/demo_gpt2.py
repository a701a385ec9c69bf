"""The first half of `make demo`: a trained character-level GPT-2 becomes a recurrent network, verified in onnxruntime.

    python -m examples.demo_gpt2 [--out build/demo] [--guide FOLDER | --guide train] [--steps 250]

Converts the guide, trains the same recurrent network from scratch and by plain logit distillation for as many steps,
exports all of them, generates text from the ONNX file alone, and prints the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from transformers import GPT2LMHeadModel

import thesean
from examples.text import Windows, corpus, decode, encode, held_out_windows
from thesean.deploy import Session
from thesean.deploy.timing.latency import latency_of_models
from thesean.report import Row, environment, render, write_report

HERE = Path(__file__).resolve().parent
CONTEXTS = (64, 512, 2048)
# Each method at its own best rate of (1e-3, 2e-3, 4e-3): benchmarks/results/recipes.json
BASELINE_RATES = {"scratch": 2e-3, "distillation": 2e-3}
PROMPT = "def __init__(self"


def load_guide(where: str, out: Path = Path("build/demo")) -> GPT2LMHeadModel:
    """The committed guide, one from a folder, or one trained now (20 minutes)."""
    folder = HERE / "guide" if where == "committed" else Path(where)
    if where == "train":
        folder = out / "guide"
        command = [sys.executable, "-m", "examples.train_guide", "--out", str(folder.resolve())]
        subprocess.run(command, check=True, cwd=HERE.parent)
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def greedy(converted: thesean.Converted, prompt: list[int], count: int) -> list[int]:
    """The torch module's own greedy text, the whole sequence anew for every token: the reference for the ONNX file."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        logits = converted(input_ids=tokens)["logits"]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


def demo(
    guide: GPT2LMHeadModel,
    out: Path,
    *,
    steps: int = 250,
    seed: int = 0,
    contexts: Sequence[int] = CONTEXTS,
    every: int = 2,
    characters: int = 200,
    repeats: int = 20,
) -> Path:
    """Convert, compare, export and save into the folder `out`; the path of its report.json.

    One in `every` held-out windows is judged, `characters` are generated, latencies take `repeats` turns. Exits when
    onnxruntime writes another text.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    data = Windows(corpus(held_out=False), batches=max(16, steps), seed=seed)
    recipe = thesean.Recipe.named("default").model_copy(update={"steps": steps})
    arguments: dict[str, Any] = dict(
        target="rnn", granularity="sublayer", data=data, eval_data=held_out_windows()[::every],
        loss=thesean.cross_entropy, metric=thesean.accuracy, recipe=recipe, seed=seed,
    )  # fmt: skip
    console.rule("plan")
    print(thesean.plan(guide, "rnn", granularity="sublayer", data=data))
    console.rule(f"convert, and train the baselines, {steps} steps each")
    models = {"converted": thesean.compile(guide, **arguments)}
    print(models["converted"].report)
    for kind, rate in BASELINE_RATES.items():
        models[kind] = thesean.baseline(guide, kind=kind, learning_rate=rate, **arguments)  # type: ignore[arg-type]
    models["converted"].save(out / "converted")

    console.rule("export and verify in onnxruntime")
    models = {"guide": models["converted"].frontier[0], **models}
    paths = {name: out / ("model.onnx" if name == "converted" else f"{name}.onnx") for name in models}
    # the guide twice: as a file that reads everything again, and with its keys and values as state
    exports = {n: m.export(paths[n], stateful="no" if n == "guide" else "auto") for n, m in models.items()}
    cached = models["guide"].export(out / "guide_cached.onnx", stateful="yes").path
    print(exports["converted"])
    session = Session(paths["converted"])
    prompt = encode(PROMPT)
    start = time.monotonic()
    generated = session.generate(prompt, characters)
    rate = characters / (time.monotonic() - start)
    same = generated == greedy(models["converted"], prompt, characters)
    console.rule(f"{characters} characters from onnxruntime, {rate:.0f} a second")
    console.print(PROMPT + decode(generated), markup=False, highlight=False)
    print(f"the torch module writes {'the same text' if same else 'ANOTHER TEXT'}")

    files = {**paths, "cached": cached}
    latency = latency_of_models(files, models["guide"].signature, contexts=contexts, repeats=repeats)
    tokens = {f"cached_token_{c}": t.median_ms for c, t in latency["cached"].token.items() if t is not None}
    rows = [
        Row(
            name=name,
            loss=model.report.converted["loss"],
            metric=model.report.converted["metric"],
            params=model.report.params,
            flops=model.report.flops,
            onnx_bytes=exports[name].bytes,
            latency_ms={k: v for k, v in latency[name].medians_ms().items() if v is not None}
            | (tokens if name == "guide" else {}),
            steps=0 if name == "guide" else model.report.steps,
            seconds=None if name == "guide" else model.report.seconds,
        )
        for name, model in models.items()
    ]
    path = write_report(
        out / "report.json",
        rows,
        stages=models["converted"].report.to_dict()["stages"],
        environment=environment(),
        extra={
            "title": "Character GPT-2 -> RNN",
            "metric_name": "next character",
            "seed": seed,
            "same_text": same,
            "generated": decode(generated),
            "notes": list(models["converted"].report.notes),
        },
    )
    models["converted"].report.html(
        out / "report.html", data=held_out_windows()[::every], decode=decode, onnx=paths["converted"]
    )
    console.print(render(rows, title="Character GPT-2 -> RNN, held-out text", metric_name="next character"))
    if not same:
        raise SystemExit("onnxruntime and torch disagree on the greedy text")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--guide", default="committed", help="'committed', 'train', or a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=2, help="one in so many held-out windows is judged")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each latency; its median is told")
    options = parser.parse_args()
    torch.set_num_threads(1)  # on shared cores a second thread can cost ten times what it gains
    guide = load_guide(options.guide, options.out)
    demo(
        guide, options.out, steps=options.steps, seed=options.seed, every=options.every, repeats=options.repeats
    )  # fmt: skip


if __name__ == "__main__":
    main()
