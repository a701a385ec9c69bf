"""Which normalisation, kernel, width and initial taps are the defaults of the convolutional targets?

Images: converts the digits demo's convnet, and one that rectifies its sums, with each setting at equal steps. Text:
replaces the attention of the demo's language model. Losses and divergences are of held-out data, after the closed form
alone and after all steps.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks import language
from benchmarks.suite import Case, Result, Run
from thesean import Target
from thesean.recipe import Recipe
from thesean.targets import conv_1d

RATE = 1e-3
IMAGES = {
    "linear": Target("linear"),
    "mlp": Target("mlp"),
    **{f"resnet-block, {norm} norm": Target("resnet-block", hidden_norm=norm) for norm in ("batch", "group", "none")},
    **{f"conv-2d, {norm} norm": Target("conv-2d", hidden_norm=norm) for norm in ("batch", "group", "none")},
    **{f"conv-2d, kernel {kernel}": Target("conv-2d", kernel=kernel) for kernel in (3, 7)},
    **{f"conv-2d, expand {expand}": Target("conv-2d", expand=expand) for expand in (2, 8)},
}
# name -> target and the steps over which initial taps fall by e
TEXT = {
    "mingru": (Target("mingru"), conv_1d.NEAR),
    **{f"conv-1d, kernel {kernel}": (Target("conv-1d", kernel=kernel), conv_1d.NEAR) for kernel in (4, 8, 16)},
    "conv-1d, kernel 8, dilations 1 and 4": (Target("conv-1d", kernel=8, dilations=[1, 4]), conv_1d.NEAR),
    "conv-1d, kernel 4, dilations 1, 4 and 16": (Target("conv-1d", kernel=4, dilations=[1, 4, 16]), conv_1d.NEAR),
    "conv-1d, kernel 8, taps alike loud": (Target("conv-1d", kernel=8), math.inf),
    "conv-1d, kernel 16, taps alike loud": (Target("conv-1d", kernel=16), math.inf),
}


class Rectified(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), the block of the first residual networks."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if stride > 1 or width != width_in else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def convert_all(
    run: Run, models: dict[str, nn.Module], targets: dict[str, Any], recipes: dict[str, Recipe], seed: int, **data: Any
) -> None:
    near = conv_1d.NEAR
    for (kind, model), (target_name, chosen), (stage, recipe) in itertools.product(
        models.items(), targets.items(), recipes.items()
    ):
        name = f"{kind}, {target_name}, {stage}"
        if not run.wants(name, seed):
            continue
        target, conv_1d.NEAR = chosen if isinstance(chosen, tuple) else (chosen, near)
        try:
            report = thesean.compile(model, target, recipe=recipe, seed=seed, progress=False, **data).report
        finally:
            conv_1d.NEAR = near
        about = {"guide": kind, "target": target_name, "recipe": stage, "steps": recipe.steps}
        run.add(name, seed, **about, params=report.params, **report.converted)


def images(run: Run, seed: int) -> None:
    from examples.demo_digits import Block, digits, recipe, train_guide

    data, held_out = digits()
    steps = run.settings["steps"]
    blocks: dict[str, type[nn.Module]] = {"pre-activation": Block, "post-activation": Rectified}
    # the demo's convnet of these blocks, trained as there
    guides: dict[str, nn.Module] = {
        name: train_guide(data, seed, run.settings["guide_steps"], block) for name, block in blocks.items()
    }
    convert_all(
        run, guides, IMAGES, {"closed form": Recipe.named("fast"), "trained": recipe(RATE, steps)}, seed, data=data,
        eval_data=held_out, loss=thesean.cross_entropy, metric=thesean.accuracy,
    )  # fmt: skip


def text(run: Run, seed: int) -> None:
    settings = {**run.settings, "steps": run.settings["text_steps"]}
    recipes = {"closed form": language.recipe("fast"), "trained": language.recipe(steps=settings["steps"])}
    convert_all(
        run, {"gpt2": language.guide(settings["layers"])}, TEXT, recipes, seed, data=language.windows(settings, seed),
        eval_data=language.held_out(settings["length"], settings["every"]), granularity="sublayer",
        loss=thesean.cross_entropy,
    )  # fmt: skip


def bench(run: Run) -> None:
    for seed in run.seeds:
        images(run, seed)
        text(run, seed)


def table(result: Result) -> str:
    """One row a guide and target: the loss after the closed form alone, and after all steps."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in result["cases"]:
        found.setdefault((row["guide"], row["target"]), {}).setdefault(row["recipe"], []).append(row)
    lines = ["| guide | target | parameters | closed form | trained |", "|---|---|---:|---:|---:|"]
    for (guide, target), stages in found.items():
        params = next(iter(stages.values()))[0]["params"]
        cells = (stages.get(stage, []) for stage in ("closed form", "trained"))
        losses = " | ".join(f"{statistics.fmean(r['loss'] for r in rows):.4f}" if rows else "-" for rows in cells)
        lines.append(f"| {guide} | {target} | {params / 1000:.0f} k | {losses} |")
    return "\n".join(lines)


CASE = Case(
    question="Which normalisation, kernel, width and initial taps are the convolutional targets' defaults?",
    minutes=20,
    unit="nats",
    run=bench,
    settings={
        "steps": 150, "guide_steps": 300, "text_steps": 80, "batch": 4, "length": 256, "every": 6, "layers": None,
    },
    quick={
        "steps": 2, "guide_steps": 2, "text_steps": 2, "batch": 2, "length": 32, "every": 80, "layers": 1,
    },
    quick_only=("pre-activation, resnet-block, group norm", "gpt2, conv-1d, kernel 4, closed form"),
    needs=("sklearn", "transformers"),
    table=table,
)  # fmt: skip
