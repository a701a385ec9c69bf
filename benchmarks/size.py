"""What does `fast` cost on a guide the size of GPT-2, and does it grow with the layers alone?

Time is in units of one forward of the guide on one of the batches, both on one thread and by the processor's clock,
capture and plan included. Memory is the process's peak, over what it takes once everything is imported, in units of
the guide's weights, which are in it: each guide has a process of its own. Random weights: what is done is the same.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.suite import ROOT, BenchmarkError, Case, Result, Run

FORWARDS = 5


def gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def batches(count: int, rows: int, length: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(0, vocabulary, (rows, length))} for _ in range(count)]


def measure(layers: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One guide, in this process, which has done nothing before."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sizes = settings["batches"], settings["rows"], settings["length"]
    small = gpt2(2, 16, 2, 32, settings["length"])
    thesean.compile(small, data=batches(*sizes, 32), recipe="fast", progress=False)  # imports what there is to import
    base = resident_mib()
    torch.manual_seed(0)
    vocabulary = settings["vocabulary"]
    guide = gpt2(layers, settings["width"], settings["heads"], vocabulary, settings["positions"])
    data = batches(*sizes, vocabulary)
    weights, forward_s = weights_mib(guide), forward_seconds(guide, data[0])
    restart_peak()
    plan_s = processor(lambda: thesean.plan(guide, data=data))
    plan_peak = peak_mib() - base
    restart_peak()
    made: list[thesean.Converted] = []
    fast_s = processor(lambda: made.append(thesean.compile(guide, data=data, recipe="fast", progress=False)))
    fast_peak = peak_mib() - base
    return {
        "layers": layers,
        "parts": len(made[0].plan.replaced),
        "weights_mib": weights,
        "forward_s": forward_s,
        "plan_forwards": plan_s / forward_s,
        "fast_s": fast_s,
        "fast_forwards": fast_s / forward_s,
        "plan_peak_weights": plan_peak / weights,
        "fast_peak_weights": fast_peak / weights,
    }


def weights_mib(guide: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in guide.parameters()) / 2**20


@torch.no_grad()
def forward_seconds(guide: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """The processor's, once it has run."""
    guide(**inputs)
    return processor(lambda: [guide(**inputs) for _ in range(FORWARDS)]) / FORWARDS


def processor(call: Callable[[], Any]) -> float:
    """Seconds of the processor's: a busy machine stretches the clock's."""
    start = time.process_time()
    call()
    return time.process_time() - start


_PROC = Path("/proc/self")


def resident_mib() -> float:
    """What this process holds in memory."""
    return _status("VmRSS") if _PROC.exists() else peak_mib()


def peak_mib() -> float:
    """The most that it held since `restart_peak`; on macOS, which counts in bytes, since it began."""
    if _PROC.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def restart_peak() -> None:
    if _PROC.exists():
        (_PROC / "clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> float:
    lines = (_PROC / "status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**10


def apart(what: str, module: str, *arguments: Any) -> dict[str, Any]:
    """A module's `measure` in a process of its own. Raises BenchmarkError, which names `what` it was asked for."""
    call = f"measure({', '.join(map(repr, arguments))})"
    code = f"import json; from {module} import measure; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise BenchmarkError(f"{what}: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def bench(run: Run) -> None:
    for layers in run.settings["layers"]:
        name = f"GPT-2, {layers} layers, width {run.settings['width']}"
        if run.wants(name):
            run.add(name, **apart(name, "benchmarks.size", layers, run.settings))


def table(result: Result) -> str:
    """One row a guide."""
    lines = [
        "| guide | weights | one forward | plan | `fast` | peak of the plan | peak of `fast` |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["cases"]:
        lines.append(
            f"| {row['name']} | {row['weights_mib']:.0f} MiB | {row['forward_s']:.2f} s | "
            f"{row['plan_forwards']:.1f} forwards | {row['fast_forwards']:.1f} forwards | "
            f"{row['plan_peak_weights']:.2f} x weights | {row['fast_peak_weights']:.2f} x weights |"
        )
    return "\n".join(lines)


CASE = Case(
    question="What does `fast` cost on a guide the size of GPT-2, and does it grow with the layers alone?",
    minutes=3,
    unit="forwards of the guide, and its weights",
    run=bench,
    settings={
        "layers": [6, 12, 24], "width": 768, "heads": 12, "vocabulary": 50257, "positions": 1024,
        "batches": 8, "rows": 4, "length": 64,
    },
    quick={"layers": [2], "width": 32, "heads": 2, "vocabulary": 64, "positions": 32, "rows": 2, "length": 8},
    needs=("transformers",),
    table=table,
)  # fmt: skip
