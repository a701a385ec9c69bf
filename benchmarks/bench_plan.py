"""What does a plan cost once the guide is exported, and does it grow with the network's depth alone?

    python benchmarks/bench_plan.py --out benchmarks/results/plan.json [--repeats 7]

GPT-2 of width 64 at 12, 24 and 48 layers, one after the other; GPT-2 small and ResNet-50 at their real sizes. Random
weights, one thread. Export is measured once, planning `--repeats` times: median, 20 and 80 percentiles, and the
processor's time beside the clock's, which a busy machine stretches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

from thesean.passes.capture.capture import capture
from thesean.passes.plan.make_plan import make_plan
from thesean.report import environment


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One guide. `us_per_node` is the median over the graph's nodes."""

    nodes: int
    parts: int
    target: str
    export_s: float
    plan_median_s: float
    plan_p20_s: float
    plan_p80_s: float
    plan_processor_s: float
    us_per_node: float
    repeats: int


def gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> nn.Module:
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 64))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224)


GUIDES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], str]] = {
    "GPT-2, 12 layers, width 64": (lambda: gpt2(12, 64, 4, 256, 128), tokens, "rnn"),
    "GPT-2, 24 layers, width 64": (lambda: gpt2(24, 64, 4, 256, 128), tokens, "rnn"),
    "GPT-2, 48 layers, width 64": (lambda: gpt2(48, 64, 4, 256, 128), tokens, "rnn"),
    "GPT-2 small, 12 layers, width 768": (lambda: gpt2(12, 768, 12, 50257, 1024), tokens, "rnn"),
    "ResNet-50, 224 x 224": (lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)), image, "mlp"),
}


def measure(make: Callable[[], nn.Module], example: Callable[[], torch.Tensor], target: str, repeats: int) -> Figures:
    torch.manual_seed(0)
    model = make().eval()
    start = time.perf_counter()
    captured = capture(model, example())
    export_s = time.perf_counter() - start
    bound_plan = make_plan(captured, target)  # the first plan of a process also imports the targets
    clock, processor = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        make_plan(captured, target)
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    median = statistics.median(clock)
    quintiles = statistics.quantiles(clock, n=5, method="inclusive")
    nodes = len(captured.graph_module.graph.nodes)
    return Figures(
        nodes=nodes,
        parts=len(bound_plan.parts),
        target=target,
        export_s=export_s,
        plan_median_s=median,
        plan_p20_s=quintiles[0],
        plan_p80_s=quintiles[-1],
        plan_processor_s=statistics.median(processor),
        us_per_node=1e6 * median / nodes,
        repeats=repeats,
    )


def table(found: dict[str, Figures]) -> Table:
    made = Table(title="planning after export, median seconds", title_justify="left")
    made.add_column("guide", no_wrap=True)
    for column in ("nodes", "parts", "export", "plan", "cpu", "us/node"):
        made.add_column(column, justify="right", no_wrap=True)
    for name, f in found.items():
        figures = (f.export_s, f.plan_median_s, f.plan_processor_s, f.us_per_node)
        made.add_row(name, str(f.nodes), str(f.parts), *(f"{v:.3g}" for v in figures))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/plan.json"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(*guide, options.repeats) for name, guide in GUIDES.items()}
    Console(width=110).print(table(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"guides": {name: asdict(f) for name, f in found.items()}, "environment": environment()}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
