"""What does each stage cost, and how does that grow with layers, width and data?

Of GPT-2 shapes with random weights, for what is done is the same: a small one, and others that differ from it in one
thing. Time is the processor's, on one thread, in forwards of the guide on one batch; memory is the process's peak while
a stage runs, over what it takes once everything is imported, in the guide's weights, which are in it. Each guide has a
process of its own. A training step of ours stands beside a loop that does nothing but the step: the guide's outputs,
the network's, their divergence, backward, clipping, AdamW.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

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
RATE, TEMPERATURE = 1e-4, 2.0


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
    converted = every_stage(guide, data, figures)
    for stage in STAGES:
        figures[stage] /= forward_s
        figures[f"{stage}_peak"] = (figures[f"{stage}_peak"] - base) / weights
    steps = settings["steps"]
    figures["step"] = trained(guide, data, steps) / steps / forward_s
    figures["bare_step"] = processor(lambda: bare_loop(guide, converted.module, data, steps)) / steps / forward_s
    return figures


def every_stage(guide: nn.Module, data: list[dict[str, torch.Tensor]], figures: dict[str, Any]) -> thesean.Converted:
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
    return made[0]


def trained(guide: nn.Module, data: list[dict[str, torch.Tensor]], steps: int) -> float:
    """Seconds that so many steps take of a run, all of it but what is there without them."""
    tuning = {"share": 1.0, "distillation": 1.0, "hidden": 0.0, "learning_rate": RATE, "temperature": TEMPERATURE}
    recipe = {"closed_form": {"enabled": False}, "alignment": {"schedule": "none", "share": 0.0}, "warmup": 0}
    given: dict[str, Any] = {"data": data, "progress": False}

    def run(count: int) -> float:
        asked = recipe | {"steps": count, "fine_tuning": tuning | ({} if count else {"share": 0.0})}
        return processor(lambda: thesean.compile(guide, recipe=asked, **given))

    return run(steps) - run(0)


def bare_loop(guide: nn.Module, network: nn.Module, data: list[dict[str, torch.Tensor]], steps: int) -> None:
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    for step in range(steps):
        inputs = data[step % len(data)]
        with torch.no_grad():
            wanted = F.log_softmax(guide(**inputs)["logits"] / TEMPERATURE, -1)
        found = F.log_softmax(network(**inputs)["logits"] / TEMPERATURE, -1)
        loss = TEMPERATURE**2 * F.kl_div(found, wanted, reduction="sum", log_target=True) / wanted[..., 0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def bench(run: Run) -> None:
    for name, sizes in run.settings["guides"].items():
        if run.wants(name):
            run.add(name, **apart(name, "benchmarks.cost", sizes, run.settings))


def table(result: Result) -> str:
    """One row a guide: forwards, and in brackets weights."""
    heads = ["guide", "weights", "one forward", *STAGES, "a training step", "a bare loop's step"]
    body = []
    for row in result["cases"]:
        cells = [row["name"], f"{row['weights_mib']:.1f} MiB", f"{row['forward_s'] * 1e3:.0f} ms"]
        cells += [f"{row[stage]:.1f} ({row[f'{stage}_peak']:.1f})" for stage in STAGES]
        cells += [f"{row['step']:.2f}", f"{row['bare_step']:.2f}"]
        body.append(cells)
    return "\n".join(markdown(heads, body))


CASE = Case(
    question="What does each stage cost, and how does that grow with layers, width and data?",
    minutes=15,
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
        "batches": 8, "rows": 4, "length": 128, "steps": 24,
    },
    quick={
        "guides": {"1 layer": {}}, "layers": 1, "width": 32, "heads": 2, "vocabulary": 64, "positions": 32,
        "batches": 4, "rows": 2, "length": 16, "steps": 2,
    },
    needs=("transformers", "onnxruntime"),
    table=table,
)  # fmt: skip
