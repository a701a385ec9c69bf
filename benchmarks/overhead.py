"""What does a training step cost over a loop by hand, and what is saved where the guide's activations are kept?

The loop by hand does a step's arithmetic and nothing else: the guide's outputs, the network's, their divergence,
backward, clipping, AdamW. It and `compile`, which runs the guide each time (`cache="off"`) or keeps what it made of
batches that come again (`cache="auto"`), take turns in one process on one thread, on the same graphs and batches. Times
are of the processor: medians over all steps. Of `compile` the looks at held-out data are told apart: a step without
one, and the mean of all.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks.size import batches, gpt2
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown
from thesean.passes.capture.capture import capture

RATE, TEMPERATURE, CLIP = 1e-4, 2.0, 1.0
# Of the first steps some make what all later ones use: the optimizer's state, the kept activations.
ROUNDS_LEFT_OUT, HEAD = 1, 2
LOOPS = ("by hand", "off", "auto")

Batches = list[dict[str, torch.Tensor]]


class Clock:
    """An observer that notes when each step of fine-tuning ended."""

    def __init__(self) -> None:
        self.phase, self.ends = "", [0.0]

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None:
        self.phase, self.ends = phase, []

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self.ends.append(time.process_time())

    def end(self, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def encoder(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=positions, num_labels=8,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


MAKERS: dict[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "encoder": encoder}


def subject(sizes: dict[str, Any], settings: dict[str, Any]) -> tuple[nn.Module, Batches]:
    shape = settings | sizes
    torch.manual_seed(0)
    guide = MAKERS[shape["maker"]](*(shape[n] for n in ("layers", "width", "heads", "vocabulary", "positions")))
    return guide, batches(shape["batches"], shape["rows"], shape["length"], shape["vocabulary"])


def measure(guide: nn.Module, data: Batches, settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a step of each loop."""
    graph = capture(guide, data[0]).graph_module
    network = engine(guide, data, 0, "off", Clock()).module
    plain: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    looks: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for turn in range(settings["rounds"] + ROUNDS_LEFT_OUT):
        for loop in LOOPS[:: 1 if turn % 2 else -1]:
            clock = Clock()
            if loop == "by hand":
                by_hand(graph, network, data, settings["steps"], clock)
            else:
                engine(guide, data, settings["steps"], loop, clock)
            taken = [1e3 * (b - a) for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
            # the second pass on, so that what can be kept has been
            first = max(HEAD, len(data)) if settings["steps"] > 2 * len(data) else HEAD
            if turn >= ROUNDS_LEFT_OUT:
                plain[loop] += taken[first:]
                looks[loop].append(mean(taken[first:]))
    return {"step_ms": {n: median(v) for n, v in plain.items()}, "mean_ms": {n: median(v) for n, v in looks.items()}}


def engine(guide: nn.Module, data: Batches, steps: int, cache: str, clock: Clock) -> thesean.Converted:
    tuning = {"share": 1.0, "distillation": 1.0, "hidden": 0.0, "learning_rate": RATE, "temperature": TEMPERATURE}
    recipe = {
        "closed_form": {"enabled": False}, "alignment": {"schedule": "none", "share": 0.0}, "warmup": 0, "clip": CLIP,
        "steps": steps, "fine_tuning": tuning if steps else {"share": 0.0},
    }  # fmt: skip
    held = data[: max(1, len(data) // 8)]
    return thesean.compile(guide, data=data, eval_data=held, recipe=recipe, cache=cache, progress=[False, clock])


def by_hand(guide: nn.Module, network: nn.Module, data: Batches, steps: int, clock: Clock) -> None:
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    clock.begin("by hand", None, 1, 1, steps)
    for step in range(steps):
        inputs = data[step % len(data)]
        with torch.no_grad():
            wanted = F.log_softmax(guide(**inputs)["logits"] / TEMPERATURE, -1)
        found = F.log_softmax(network(**inputs)["logits"] / TEMPERATURE, -1)
        loss = TEMPERATURE**2 * F.kl_div(found, wanted, reduction="sum", log_target=True) / wanted[..., 0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        clock.step(step + 1, {"loss": loss.item()})


def bench(run: Run) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # random weights, little data: no quality is measured here
    for name, sizes in run.settings["guides"].items():
        if run.wants(name):
            run.add(name, **measure(*subject(sizes, run.settings), run.settings))


def table(result: Result) -> str:
    """One row a guide: milliseconds of the processor a step."""
    heads = ["guide", "by hand", "`compile`", "with its looks", "activations kept", "with its looks"]
    body = []
    for row in result["cases"]:
        step, looked = row["step_ms"], row["mean_ms"]
        hand = step["by hand"]
        body.append([row["name"], f"{hand:.1f}"])
        for loop in ("off", "auto"):
            body[-1] += [f"{figures[loop]:.1f} ({figures[loop] / hand - 1:+.0%})" for figures in (step, looked)]
    return "\n".join(markdown(heads, body))


CASE = Case(
    question="What does a training step cost over a loop by hand, and what is saved where activations are kept?",
    minutes=35,
    unit="milliseconds of the processor a step",
    run=bench,
    settings={
        "guides": {
            "GPT-2, 4 layers of width 128, 8 x 64": {"layers": 4, "width": 128, "rows": 8, "length": 64},
            "GPT-2, 6 layers of width 256, 4 x 128": {},
            "GPT-2, 2 layers of width 768, 4 x 128": {"layers": 2, "width": 768, "heads": 12},
            "BERT, 6 layers of width 384, 8 x 64": {"maker": "encoder", "width": 384, "rows": 8, "length": 64},
        },
        "maker": "gpt2", "layers": 6, "width": 256, "heads": 4, "vocabulary": 1024, "positions": 512,
        "batches": 8, "rows": 4, "length": 128, "steps": 40, "rounds": 6,
    },
    quick={
        "guides": {"GPT-2, 1 layer": {}}, "layers": 1, "width": 32, "heads": 2, "vocabulary": 64, "positions": 32,
        "batches": 4, "rows": 2, "length": 16, "steps": 10, "rounds": 1,
    },
    needs=("transformers",),
    table=table,
)  # fmt: skip
