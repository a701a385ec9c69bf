"""Which normalisation, kernel, width and initial taps are the defaults of the convolutional targets?

    python benchmarks/convolutions.py --out benchmarks/results/convolutions.json

Images: converts the digits demo's convnet, and one that rectifies its sums, with each setting at equal steps. Text:
replaces the attention of the demo's language model. Losses and divergences are of held-out data, after the closed form
alone and after all steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from torch import nn
from torch.nn import functional as F

import demo_digits
import thesean
from thesean import Target
from thesean.recipe import Recipe
from thesean.report import environment
from thesean.targets import conv_1d

STEPS, TEXT_STEPS = 150, 80
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


def guide(block: type[nn.Module], seed: int) -> nn.Module:
    """The demo's convnet of these blocks, trained as there."""
    usual, demo_digits.Block = demo_digits.Block, block  # type: ignore[misc, assignment]
    try:
        return demo_digits.train_guide(demo_digits.digits()[0], seed)
    finally:
        demo_digits.Block = usual  # type: ignore[misc]


class Results:
    """The runs in a file, written after each one: an interrupted benchmark goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def convert_all(
        self, models: dict[str, nn.Module], targets: dict[str, Any], recipes: dict[str, Recipe], seed: int, **data: Any
    ) -> None:
        near = conv_1d.NEAR
        for (kind, model), (name, chosen), (stage, recipe) in itertools.product(
            models.items(), targets.items(), recipes.items()
        ):
            about = {"guide": kind, "target": name, "recipe": stage, "steps": recipe.steps, "seed": seed}
            if any(about.items() <= run.items() for run in self.runs):
                continue
            target, conv_1d.NEAR = chosen if isinstance(chosen, tuple) else (chosen, near)
            report = thesean.compile(model, target, recipe=recipe, seed=seed, progress=False, **data).report
            self.runs.append({**about, "params": report.params, **report.converted})
            print(f"{kind:16s} {name:40s} {stage:12s} loss {report.converted['loss']:.4f}", flush=True)
            self.path.write_text(json.dumps({"runs": self.runs, "environment": environment()}, indent=1) + "\n")


def images(results: Results, seed: int) -> None:
    data, held_out = demo_digits.digits()
    trained = demo_digits.recipe(RATE).model_copy(update={"steps": STEPS})
    results.convert_all(
        {"pre-activation": guide(demo_digits.Block, seed), "post-activation": guide(Rectified, seed)},
        IMAGES, {"closed form": Recipe.named("fast"), "trained": trained}, data=data, eval_data=held_out,
        loss=thesean.cross_entropy, metric=thesean.accuracy, seed=seed,
    )  # fmt: skip


def text(results: Results, seed: int) -> None:
    from recipes import recipe
    from transformers import GPT2LMHeadModel

    from text import Windows, corpus, held_out_windows

    folder = Path(__file__).resolve().parents[1] / "examples" / "guide"
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    data = Windows(corpus(held_out=False), batches=TEXT_STEPS, seed=seed)
    trained = recipe().model_copy(update={"steps": TEXT_STEPS})
    results.convert_all(
        {"gpt2": model}, TEXT, {"closed form": recipe("fast"), "trained": trained}, data=data,
        eval_data=held_out_windows()[::6], granularity="sublayer", loss=thesean.cross_entropy, seed=seed,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/convolutions.json"))
    parser.add_argument("--only", choices=["images", "text"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.out)
    for name, run in (("images", images), ("text", text)):
        if options.only in (None, name):
            run(results, options.seed)


if __name__ == "__main__":
    main()
