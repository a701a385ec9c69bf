"""The second half of `make demo`, under a minute: a convnet on 8 x 8 digits becomes a multilayer perceptron.

    python -m examples.demo_digits [--out build/demo/digits] [--steps 300]

The guide is trained on the spot. Its residual blocks are replaced by flattening MLPs and compared with the same MLPs
from scratch and with plain logit distillation, at equal steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import thesean
from thesean.deploy.timing.latency import latency_of_models
from thesean.report import Row, environment, render, write_report

Model = TypeVar("Model", bound=nn.Module)

STEPS = 300
# Of (5e-4, 1e-3, 2e-3, 4e-3), three seeds each, this is the baselines' best rate; the conversion's is half of it, by
# less than seeds differ: benchmarks/results/digits.json
RATES = {"converted": 1e-3, "scratch": 1e-3, "distillation": 1e-3}


class Block(nn.Module):
    """A pre-activation residual block; changes width by a projected shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if stride > 1 or width != width_in else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return y + (x if self.shortcut is None else self.shortcut(h))


class Convnet(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1)
        self.blocks = nn.Sequential(block(16, 16, 1), block(16, 32, 2), block(32, 32, 1))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.stem(x))
        return self.head(F.relu(self.norm(h)).mean((2, 3)))


@dataclass(frozen=True)
class Shuffled:
    """Batches of (images, labels), shuffled anew at each pass but the same for the same seed."""

    x: torch.Tensor
    y: torch.Tensor
    batch: int = 64
    seed: int = 0
    passes: int = 40

    def __iter__(self):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.passes):
            order = torch.randperm(len(self.x), generator=generator)
            for i in range(0, len(order) - self.batch + 1, self.batch):
                rows = order[i : i + self.batch]
                yield self.x[rows], self.y[rows]


def digits() -> tuple[Shuffled, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Training batches and held-out ones: every fourth image is held out."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    test = torch.arange(len(x)) % 4 == 0
    return Shuffled(x[~test], y[~test]), [(x[test], y[test])]


def train_guide(data: Shuffled, seed: int = 0, steps: int = STEPS, block: type[nn.Module] = Block) -> Convnet:
    torch.manual_seed(seed)
    return train(Convnet(block), data, steps, 3e-3)


def train(model: Model, data: Iterable[tuple[torch.Tensor, torch.Tensor]], steps: int, rate: float) -> Model:
    """A classifier, from its first weights."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _, (x, y) in zip(range(steps), data, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def recipe(rate: float, steps: int = STEPS) -> thesean.Recipe:
    """The default at a budget, this demo's, and a learning rate."""
    default = thesean.Recipe.named("default")
    tuning = default.fine_tuning.model_copy(update={"learning_rate": rate})
    return default.model_copy(update={"steps": steps, "fine_tuning": tuning})


def demo(out: Path, steps: int = STEPS, seed: int = 0) -> Path:
    """Convert, compare, export and save into the folder `out`; the path of its report.json."""
    console = Console()
    data, held_out = digits()
    guide = train_guide(data, seed, steps)
    arguments: dict[str, Any] = dict(
        target="mlp", data=data, eval_data=held_out, loss=thesean.cross_entropy, metric=thesean.accuracy, seed=seed
    )
    print(thesean.plan(guide, "mlp", data=data))
    models = {"converted": thesean.compile(guide, recipe=recipe(RATES["converted"], steps), **arguments)}
    for kind in ("scratch", "distillation"):
        models[kind] = thesean.baseline(guide, kind=kind, recipe=recipe(RATES[kind], steps), **arguments)
    models = {"guide": models["converted"].frontier[0], **models}
    out.mkdir(parents=True, exist_ok=True)
    exports = {name: model.export(out / f"{name}.onnx") for name, model in models.items()}
    latency = latency_of_models({n: out / f"{n}.onnx" for n in models}, models["guide"].signature)
    rows = [
        Row(
            name=name,
            loss=model.report.converted["loss"],
            metric=model.report.converted["metric"],
            params=model.report.params,
            flops=model.report.flops,
            onnx_bytes=exports[name].bytes,
            latency_ms={k: v for k, v in latency[name].medians_ms().items() if v is not None},
            steps=steps if name == "guide" else model.report.steps,
            seconds=None if name == "guide" else model.report.seconds,
        )
        for name, model in models.items()
    ]
    models["converted"].save(out / "converted")
    models["converted"].report.html(out / "report.html", data=held_out, onnx=out / "converted.onnx")
    stages = models["converted"].report.to_dict()["stages"]
    path = write_report(
        out / "report.json", rows, stages=stages, environment=environment(),
        extra={"title": "Digits: convnet -> MLP", "metric_name": "accuracy", "seed": seed},
    )  # fmt: skip
    print(models["converted"].report)
    console.print(render(rows, title="Digits: convnet -> MLP", metric_name="accuracy"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo/digits"))
    parser.add_argument("--steps", type=int, default=STEPS, help="of the guide and of each network made of it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # on shared cores a second thread can cost ten times what it gains
    demo(options.out, steps=options.steps, seed=options.seed)


if __name__ == "__main__":
    main()
