"""What does each stage cost, and how does that grow with layers, width and data?

Of GPT-2 shapes with random weights, for what is done is the same: a small one, and others that differ from it in one
thing. Time is the processor's, on one thread, in forwards of the guide on one batch; memory is the process's peak while
a stage runs, over what it takes once everything is imported, in the guide's weights, which are in it. Each guide has a
process of its own. What a training step costs over a loop by hand is `overhead`'s question.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.size import (
    apart,
    batches,
    forward_seconds,
    gpt2,
    peak_mib,
    processor,
    resident_mib,
    restart_peak,
    weights_mib,
)
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown
from thesean.passes.capture.capture import capture

STAGES = ("capture", "plan", "fast", "export")


def measure(sizes: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One guide, in this process, which has done nothing before."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shape = settings | sizes
    form = shape["batches"], shape["rows"], shape["length"]
    every_stage(gpt2(1, 16, 2, 32, shape["length"]), batches(*form, 32), {})  # imports what there is to import
    base = resident_mib()
    torch.manual_seed(0)
    guide = gpt2(*(shape[name] for name in ("layers", "width", "heads", "vocabulary", "positions")))
    data = batches(*form, shape["vocabulary"])
    weights, forward_s = weights_mib(guide), forward_seconds(guide, data[0])
    figures: dict[str, Any] = {"weights_mib": weights, "forward_s": forward_s}
    every_stage(guide, data, figures)
    for stage in STAGES:
        figures[stage] /= forward_s
        figures[f"{stage}_peak"] = (figures[f"{stage}_peak"] - base) / weights
    return figures


def every_stage(guide: nn.Module, data: list[dict[str, torch.Tensor]], figures: dict[str, Any]) -> None:
    """Seconds and the most memory of each, into `figures`; `plan` is a capture too, and `fast` a plan."""
    made: list[thesean.Converted] = []
    given: dict[str, Any] = {"data": data, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        stages: dict[str, Callable[[], Any]] = {
            "capture": lambda: capture(guide, data[0]),
            "plan": lambda: thesean.plan(guide, data=data),
            "fast": lambda: made.append(thesean.compile(guide, recipe="fast", **given)),
            "export": lambda: made[0].export(Path(folder) / "model.onnx"),
        }
        for name in STAGES:
            restart_peak()
            figures[name] = processor(stages[name])
            figures[f"{name}_peak"] = peak_mib()


def bench(run: Run) -> None:
    for name, sizes in run.settings["guides"].items():
        if run.wants(name):
            run.add(name, **apart(name, "benchmarks.cost", sizes, run.settings))


def table(result: Result) -> str:
    """One row a guide: forwards, and in brackets weights."""
    heads = ["guide", "weights", "one forward", *STAGES]
    body = []
    for row in result["cases"]:
        cells = [row["name"], f"{row['weights_mib']:.1f} MiB", f"{row['forward_s'] * 1e3:.0f} ms"]
        cells += [f"{row[stage]:.1f} ({row[f'{stage}_peak']:.1f})" for stage in STAGES]
        body.append(cells)
    return "\n".join(markdown(heads, body))


CASE = Case(
    question="What does each stage cost, and how does that grow with layers, width and data?",
    minutes=12,
    unit="forwards of the guide, and its weights",
    run=bench,
    settings={
        "guides": {
            "6 layers of width 256, 8 batches": {},
            "12 layers": {"layers": 12},
            "24 layers": {"layers": 24},
            "width 512": {"width": 512},
            "width 1,024": {"width": 1024},
            "16 batches": {"batches": 16},
            "32 batches": {"batches": 32},
        },
        "layers": 6, "width": 256, "heads": 4, "vocabulary": 8192, "positions": 512,
        "batches": 8, "rows": 4, "length": 128,
    },
    quick={
        "guides": {"1 layer": {}}, "layers": 1, "width": 32, "heads": 2, "vocabulary": 64, "positions": 32,
        "batches": 4, "rows": 2, "length": 16,
    },
    needs=("transformers", "onnxruntime"),
    table=table,
)  # fmt: skip
