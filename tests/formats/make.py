"""The files of v1/, made once by version 0.1.0 of Thesean; never regenerate them.

They are what users of that version have on their disks, and tests/test_formats.py shows that later ones still read
them. A new format gets a script and a folder of its own. `python -m tests.formats.make FOLDER`

B batch, T time, D width
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree

import thesean
from tests import models
from thesean.report import Row, write_report
from thesean.targets import Target

Batches = list[Any]


class Gates(nn.Module):
    """x_BTD -> y_BTD: two gated MLPs and their residual streams."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(3)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            gate, up, down = layer.children()
            x = x + down(nn.functional.silu(gate(x)) * up(x))
        return x


def of_tokens() -> tuple[nn.Module, Batches]:
    return models.gpt2(layers=1, width=8), models.token_batches()


def of_rotary_tokens() -> tuple[nn.Module, Batches]:
    return models.llama(layers=1, width=8, heads=2, groups=1), models.token_batches()


def of_sequences() -> tuple[nn.Module, Batches]:
    return models.token_mixer(layers=1), [models.vectors(4, 6, 8, seed=k) for k in range(4)]


def of_gates() -> tuple[nn.Module, Batches]:
    return models.seeded(Gates), [models.vectors(4, 6, 8, seed=k) for k in range(4)]


def of_fixed_sequences() -> tuple[nn.Module, Batches]:
    guide, batches = of_sequences()
    return models.FixedLength(guide, 6, 8), batches


def of_both_directions() -> tuple[nn.Module, Batches]:
    return models.encoder(width=8, layers=1), [models.vectors(4, 6, 8, seed=k) for k in range(4)]


def of_images() -> tuple[nn.Module, Batches]:
    return models.resnet(channels=(2,)), [models.vectors(4, 1, 4, 4, seed=k) for k in range(4)]


def of_vectors() -> tuple[nn.Module, Batches]:
    return models.mlp(depth=1), [models.vectors(4, 8, seed=k) for k in range(4)]


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rnn": (of_tokens, "rnn", {}),
    "linear-attention-window": (of_tokens, Target("linear-attention", window=3), {}),
    "linear-attention-groups": (of_rotary_tokens, "linear-attention", {}),
    "linear-attention-both-ways": (of_both_directions, "linear-attention", {}),
    "delta": (of_tokens, "delta", {}),
    "narrow-heads": (of_tokens, Target("narrow-heads", heads=1), {}),
    "gru": (of_sequences, "gru", {}),
    "lstm": (of_sequences, "lstm", {}),
    "elman": (of_sequences, "elman", {}),
    "mingru": (of_sequences, "mingru", {}),
    "mingru-both-ways": (of_both_directions, "mingru", {}),
    "delta-of-no-attention": (of_sequences, "delta", {}),
    "ssm": (of_sequences, "ssm", {}),
    "reservoir": (of_sequences, Target("reservoir", width=8), {}),
    "conv-1d": (of_sequences, "conv", {}),
    "mixer": (of_fixed_sequences, "mixer", {}),
    "linear": (of_sequences, "linear", {}),
    "identity": (of_sequences, "identity", {}),
    "mlp": (of_sequences, "mlp", {"parts": ["wise.0"]}),
    "narrow": (of_sequences, Target("narrow", ratio=0.5), {"parts": ["wise.0"]}),
    "narrow-gated": (of_gates, Target("narrow", ratio=0.5), {}),
    "mlp-of-vectors": (of_vectors, "mlp", {}),
    "linear-of-maps": (of_images, "linear", {"parts": ["blocks.1"]}),
    "conv-2d": (of_images, "conv", {"parts": ["blocks.1"]}),
    "resnet-block": (of_images, "resnet-block", {"parts": ["blocks.1"]}),
}


def converted(case: str) -> thesean.Converted:
    guide_and_data, target, settings = CASES[case]
    guide, data = guide_and_data()
    return thesean.compile(guide, target, data=data, recipe="fast", progress=False, **settings)


def examples(conversion: thesean.Converted) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of two sizes."""
    symbols = conversion.signature.symbols
    for batch, time in ((2, 7), (1, 3)):
        yield conversion.signature.random_inputs({s: batch if s.startswith("batch") else time for s in symbols})


def make_conversions(folder: Path) -> None:
    for case in CASES:
        conversion = converted(case)
        tensors: dict[str, torch.Tensor] = {}
        for number, inputs in enumerate(examples(conversion)):
            with torch.no_grad():
                outputs = _pytree.tree_leaves(conversion(**inputs))
            tensors |= {f"{number}.input.{name}": value for name, value in inputs.items()}
            tensors |= {f"{number}.output.{place}": value.contiguous() for place, value in enumerate(outputs)}
        conversion.save(folder / case)
        save_file(tensors, folder / f"{case}.safetensors")


def make_plans(folder: Path) -> None:
    """Between them they fill each field: what is edited or merged, latencies, candidates."""
    folder.mkdir(parents=True)
    guide, data = models.gpt2(4, 8), models.token_batches(10)
    merged = thesean.plan(guide, "rnn", data=data, merge=2, granularity="block")
    merged.edit("transformer.h.2*", Target("mingru", width=12, scope="part")).to_yaml(folder / "merged-and-edited.yaml")
    thesean.plan(guide, "copy", data=data, merge=2).to_yaml(folder / "copies.yaml")
    thesean.plan(guide, "rnn", data=data, keep=["*.h.3*"], context=16, batch=[1, 2]).to_yaml(folder / "latencies.yaml")
    thesean.plan(
        models.gpt2(2, 8),
        "auto",
        data=data,
        constraints={"params": 2300, "latency_ms": 9.0, "context": 16},
        candidates=["keep", "identity", Target("linear-attention", window=3)],
        progress=False,
    ).to_yaml(folder / "candidates.yaml")
    thesean.plan(*of_images()[:1], "mlp", data=of_images()[1]).to_yaml(folder / "maps.yaml")


def make_recipes(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("default", "fast", "paper"):
        thesean.Recipe.named(name).to_yaml(folder / f"{name}.yaml")
    settings = {"steps": 7, "positions": "wrap", "alignment": {"measure": "cka", "schedule": "joint"}}
    thesean.Recipe.resolve(settings).to_yaml(folder / "custom.yaml")


def make_report(path: Path) -> None:
    """As `thesean demo` writes it, without this machine's environment."""
    conversion = converted("rnn")
    report = conversion.report
    latency_ms = {k: v for k, v in conversion.benchmark([16], repeats=5).items() if v is not None}
    rows = [
        Row(name="converted", params=report.params, flops=report.flops, loss=report.converted["loss"],
            metric=report.converted["divergence"], latency_ms=latency_ms,
            steps=report.steps, seconds=report.seconds),
        Row(name="guide", loss=report.guide["loss"]),
    ]  # fmt: skip
    stages = report.to_dict()["stages"]
    write_report(path, rows, stages, {"python": "3.11", "torch": "2.13", "commit": None}, {"seed": report.seed})


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    make_conversions(root / "conversions")
    make_plans(root / "plans")
    make_recipes(root / "recipes")
    make_report(root / "report.json")
