"""Does a guide of a billion weights in bfloat16 go through `fast`, and what does that take?

Llama's shape: rotary positions, grouped keys and values, gated MLPs; random weights, since what is done is the same. In
a process of its own on one thread, with few and small batches. Time is the processor's, capture included. Memory is the
process's peak while a step runs, over what it takes once everything is imported, in units of the guide's weights, which
are in it.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.size import apart, batches, peak_mib, processor, resident_mib, restart_peak, weights_mib
from benchmarks.suite import Case, Result, Run


def llama(settings: dict[str, Any], layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = {
        "width": "hidden_size", "heads": "num_attention_heads", "groups": "num_key_value_heads",
        "hidden": "intermediate_size", "vocabulary": "vocab_size",
    }  # fmt: skip
    sizes = {theirs: settings[ours] for ours, theirs in names.items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, settings["dtype"]))
    try:
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes)).eval()
    finally:
        torch.set_default_dtype(before)


def measure(layers: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One guide, in this process, which has done nothing before."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sizes = settings["batches"], settings["rows"], settings["length"]
    tiny = {**settings, "width": 16, "heads": 2, "groups": 1, "hidden": 32, "vocabulary": 32}
    convert(llama(tiny, 2), batches(*sizes, 32), settings)  # imports what there is to import
    base = resident_mib()
    torch.manual_seed(0)
    guides, data = [llama(settings, layers)], batches(*sizes, settings["vocabulary"])
    weights = weights_mib(guides[0])
    made: list[thesean.Converted] = []
    row: dict[str, Any] = {
        "layers": layers,
        "dtype": settings["dtype"],
        "params": sum(p.numel() for p in guides[0].parameters()),
        "weights_mib": weights,
    }

    def step(name: str, call: Callable[[], Any]) -> None:
        gc.collect()
        restart_peak()
        row[f"{name}_s"] = processor(call)
        row[f"{name}_peak_weights"] = (peak_mib() - base) / weights

    with torch.no_grad():
        guides[0](**data[0])
        row["forward_s"] = processor(lambda: guides[0](**data[0]))
    step("plan", lambda: thesean.plan(guides[0], settings["target"], data=data))
    step("fast", lambda: made.append(convert(guides[0], data, settings)))
    guides.clear()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        step("save", lambda: made[0].save(f"{folder}/converted"))
        row["parts"], row["divergence"] = len(made[0].plan.replaced), made[0].report.converted["divergence"]
        before = made.pop()(**data[0]).logits.clone()
        step("load", lambda: made.append(thesean.load(f"{folder}/converted")))
        row["same_after_loading"] = torch.equal(made[0](**data[0]).logits, before)
    return row


def convert(guide: nn.Module, data: list[dict[str, torch.Tensor]], settings: dict[str, Any]) -> thesean.Converted:
    return thesean.compile(guide, settings["target"], data=data, recipe="fast", progress=False)


def bench(run: Run) -> None:
    for layers in run.settings["layers"]:
        name = f"Llama's shape, {layers} layers, width {run.settings['width']}, {run.settings['dtype']}"
        if run.wants(name):
            run.add(name, **apart(name, "benchmarks.half", layers, run.settings))


def table(result: Result) -> str:
    """One row a guide."""
    lines = [
        "| guide | weights | one forward | plan | `fast` | saved | loaded | peak of the plan | peak of `fast` |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["cases"]:
        lines.append(
            f"| {row['name']} | {row['params'] / 1e9:.2f} G, {row['weights_mib']:.0f} MiB | {row['forward_s']:.2f} s | "
            f"{row['plan_s']:.0f} s | {row['fast_s']:.0f} s | {row['save_s']:.0f} s | {row['load_s']:.0f} s | "
            f"{row['plan_peak_weights']:.2f} x weights | {row['fast_peak_weights']:.2f} x weights |"
        )
    return "\n".join(lines)


CASE = Case(
    question="Does a guide of a billion weights in bfloat16 go through `fast`, and what does that take?",
    minutes=4,
    unit="seconds of the processor, and the guide's weights",
    run=bench,
    settings={
        "layers": [22], "width": 2048, "heads": 32, "groups": 4, "hidden": 5632, "vocabulary": 32000,
        "dtype": "bfloat16", "target": "rnn", "batches": 3, "rows": 2, "length": 32,
    },
    quick={"layers": [2], "width": 32, "heads": 4, "groups": 2, "hidden": 64, "vocabulary": 64, "length": 8},
    needs=("transformers",),
    table=table,
)  # fmt: skip
