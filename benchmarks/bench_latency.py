"""What does each target cost to serve? Prefill and one more token in onnxruntime, side by side, one thread.

    python benchmarks/bench_latency.py --out benchmarks/results/latency.json [--contexts 64 512 2048] [--batch 1]

The guide is a GPT-2 of 4 layers, width 256, with random weights: latency does not depend on them. Every file is
exported and verified first; runs are interleaved, figures are medians with 20 and 80 percentiles.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

import thesean
from thesean.deploy.timing.latency import FileTimings, latency_of_models
from thesean.report import environment

TARGETS: dict[str, Any] = {
    "rnn": "rnn",
    "mingru": "mingru",
    "gru": "gru",
    "lstm": "lstm",
    "elman": "elman",
    "gru, whole blocks": thesean.Target("gru", scope="part"),
    "mingru, whole blocks": thesean.Target("mingru", scope="part"),
}


def guide(positions: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=positions, n_embd=256, n_layer=4, n_head=8, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def table(found: dict[str, FileTimings]) -> Table:
    columns = list(next(iter(found.values())).medians_ms())
    made = Table(title="median ms in onnxruntime; the guide recomputes its context for a token", title_justify="left")
    made.add_column("target", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    for name, figures in found.items():
        made.add_row(name, *("-" if v is None else f"{v:.3g}" for v in figures.medians_ms().values()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/latency.json"))
    parser.add_argument("--contexts", type=int, nargs="*", default=[64, 512, 2048])
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = guide(positions=max(options.contexts))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no data given")  # weights don't matter here
        paths: dict[str, Path] = {}
        for name, target in TARGETS.items():
            converted = thesean.compile(model, target, recipe="fast", progress=False)
            if not paths:
                paths["guide"] = converted.frontier[0].export(Path(folder) / "guide.onnx").path
            paths[name] = converted.export(Path(folder) / f"{len(paths)}.onnx").path
            signature = converted.signature
        found = latency_of_models(paths, signature, contexts=options.contexts, batch=options.batch)
    Console().print(table(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: asdict(figures) for name, figures in found.items()}
    document = {"batch": options.batch, "models": rows, "environment": environment()}
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
