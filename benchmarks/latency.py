"""What does each target cost to serve? Prefill and one more token in onnxruntime, side by side, one thread.

The guide is a GPT-2 of 4 layers, width 256, with random weights: latency does not depend on them. Every file is
exported and verified first; runs are interleaved, figures are medians with 20 and 80 percentiles.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import thesean
from benchmarks.suite import Case, Result, Run
from thesean.deploy.timing.latency import latency_of_models

TARGETS: dict[str, Any] = {
    "rnn": "rnn",
    "mingru": "mingru",
    "gru": "gru",
    "lstm": "lstm",
    "elman": "elman",
    "gru, whole blocks": thesean.Target("gru", scope="part"),
    "mingru, whole blocks": thesean.Target("mingru", scope="part"),
}


def guide(layers: int, positions: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=positions, n_embd=256, n_layer=layers, n_head=8, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def bench(run: Run) -> None:
    contexts, batch = run.settings["contexts"], run.settings["batch"]
    model = guide(run.settings["layers"], positions=max(contexts))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no data given")  # weights don't matter here
        paths: dict[str, Path] = {}
        for name, target in TARGETS.items():
            if not run.wants(name):
                continue
            converted = thesean.compile(model, target, recipe="fast", progress=False)
            if not paths:
                paths["guide"] = converted.frontier[0].export(Path(folder) / "guide.onnx").path
            paths[name] = converted.export(Path(folder) / f"{len(paths)}.onnx").path
            signature = converted.signature
        if paths:  # all of one call, whose files take turns
            for name, figures in latency_of_models(paths, signature, contexts=contexts, batch=batch).items():
                run.add(name, **asdict(figures))


def table(result: Result) -> str:
    """Medians, and how the guide makes a token."""
    kinds = {row["name"]: row["token_kind"] for row in result["cases"]}
    guide = "recomputes its context for" if kinds.get("guide") == "recompute" else "has its keys and values cached at"
    contexts = [str(c) for c in result["settings"]["contexts"]]
    columns = [(kind, c) for kind in ("prefill", "token") for c in contexts]
    heads = (f"prefill of {c}" if kind == "prefill" else f"token at {c}" for kind, c in columns)
    lines = [
        f"Milliseconds, batch {result['settings']['batch']}; the guide {guide} a token.",
        "",
        f"| target | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in result["cases"]:
        figures = (row[kind].get(c) for kind, c in columns)
        cells = ("-" if figure is None else f"{figure['median_ms']:.3g}" for figure in figures)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


CASE = Case(
    question="What does each target cost to serve, a prefill and one more token?",
    minutes=4,
    unit="ms",
    run=bench,
    settings={"layers": 4, "contexts": [64, 512, 2048], "batch": 1},
    quick={"layers": 1, "contexts": [8]},
    quick_only=("rnn",),
    needs=("onnxruntime", "transformers"),
    table=table,
)
