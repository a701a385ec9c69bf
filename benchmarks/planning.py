"""What does a plan cost once the guide is exported, and does it grow with the network's depth alone?

GPT-2 of width 64 at 12, 24 and 48 layers, one after the other; GPT-2 small and ResNet-50 at their real sizes. Random
weights, one thread. Export is measured once, planning again and again: median, 20 and 80 percentiles, and the
processor's time beside the clock's, which a busy machine stretches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.suite import Case, Result, Run, percentiles
from thesean.passes.capture.capture import capture
from thesean.passes.plan.make_plan import make_plan


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
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 64))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224)


Guide = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], str]


def guides(layers: list[int], real_sizes: bool) -> dict[str, Guide]:
    """Name -> how to make it, its input, the target."""
    found: dict[str, Guide] = {
        f"GPT-2, {n} layers, width 64": (partial(gpt2, n, 64, 4, 256, 128), tokens, "rnn") for n in layers
    }
    if real_sizes:
        found["GPT-2 small, 12 layers, width 768"] = (partial(gpt2, 12, 768, 12, 50257, 1024), tokens, "rnn")
        found["ResNet-50, 224 x 224"] = (resnet50, image, "mlp")
    return found


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
    median, p20, p80 = percentiles(clock)
    nodes = len(captured.graph_module.graph.nodes)
    return Figures(
        nodes=nodes,
        parts=len(bound_plan.parts),
        target=target,
        export_s=export_s,
        plan_median_s=median,
        plan_p20_s=p20,
        plan_p80_s=p80,
        plan_processor_s=percentiles(processor)[0],
        us_per_node=1e6 * median / nodes,
        repeats=repeats,
    )


def bench(run: Run) -> None:
    for name, guide in guides(run.settings["layers"], run.settings["real_sizes"]).items():
        if run.wants(name):
            run.add(name, **asdict(measure(*guide, run.settings["repeats"])))


def table(result: Result) -> str:
    """One row a guide."""
    lines = ["| guide | nodes | parts | export | plan | a node |", "|---|---:|---:|---:|---:|---:|"]
    for row in result["cases"]:
        lines.append(
            f"| {row['name']} | {row['nodes']} | {row['parts']} | {row['export_s']:.1f} s | "
            f"{row['plan_median_s']:.2f} s | {row['us_per_node']:.0f} us |"
        )
    return "\n".join(lines)


CASE = Case(
    question="What does a plan cost once the guide is exported, and does it grow with depth alone?",
    minutes=2,
    unit="s",
    run=bench,
    settings={"repeats": 7, "layers": [12, 24, 48], "real_sizes": True},
    quick={"repeats": 2, "layers": [2], "real_sizes": False},
    needs=("transformers",),
    table=table,
)
