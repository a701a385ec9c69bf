"""Fashion-MNIST (Xiao et al. 2017) as Debian's package `dataset-fashion-mnist` installs it, and guides for it.

B batch, T time, D width, H height, W width of an image
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.suite import BenchmarkError
from examples.demo_digits import Block

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
SIDE = 28
_KEPT, _VALIDATION, _EVALUATED = 12_000, 2_000, 500  # images to train on, to choose by, of a batch that is judged


class Images(NamedTuple):
    """x_B1HW, zero mean and unit variance over the training images, and labels_B."""

    x: torch.Tensor
    y: torch.Tensor

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.x.split(_EVALUATED), self.y.split(_EVALUATED), strict=True))


class Split(NamedTuple):
    train: Images
    validation: Images
    test: Images


@cache
def fashion() -> Split:
    """12,000 images to train on, 2,000 others of the training set to choose by, the 10,000 of the test set. Raises
    BenchmarkError where the package is missing.
    """
    x, y = _read("train-images-idx3"), _read("train-labels-idx1").long()
    test_x, test_y = _read("t10k-images-idx3"), _read("t10k-labels-idx1").long()
    kept = x[:_KEPT].float()
    mean, std = kept.mean(), kept.std()
    x, test_x = (((z.float() - mean) / std).unsqueeze(1) for z in (x[: _KEPT + _VALIDATION], test_x))
    return Split(
        Images(x[:_KEPT], y[:_KEPT]),
        Images(x[_KEPT:], y[_KEPT : _KEPT + _VALIDATION]),
        Images(test_x, test_y),
    )


def _read(name: str) -> torch.Tensor:
    """An idx file: two zero bytes, a type, the number of dimensions, their sizes, bytes."""
    path = FOLDER / f"{name}-ubyte.gz"
    if not path.exists():
        raise BenchmarkError(f"{path} is missing: on Debian, apt-get install dataset-fashion-mnist.")
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.frombuffer(bytearray(data[4 + 4 * data[3] :]), dtype=torch.uint8).reshape(shape)


@dataclass(frozen=True)
class Drawn:
    """Batches of training images drawn at random, half of them mirrored, all of a batch moved by up to two pixels;
    re-iterable: the same batches at every pass, drawn from `seed`.
    """

    batches: int
    batch: int
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, generator = fashion().train, torch.Generator().manual_seed(self.seed)
        empty = float(images.x.min())
        for _ in range(self.batches):
            rows = torch.randint(0, len(images.x), (self.batch,), generator=generator)
            x_B1HW = images.x[rows]
            mirrored_B = torch.rand(self.batch, generator=generator) < 0.5
            x_B1HW = torch.where(mirrored_B[:, None, None, None], x_B1HW.flip(3), x_B1HW)
            top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
            x_B1HW = F.pad(x_B1HW, (2, 2, 2, 2), value=empty)[:, :, top : top + SIDE, left : left + SIDE]
            yield x_B1HW.contiguous(), images.y[rows]

    def __len__(self) -> int:
        return self.batches


class Convnet(nn.Module):
    """pixels_B1HW -> logits: residual blocks of (channels in, channels out, stride)."""

    def __init__(self, *blocks: tuple[int, int, int]) -> None:
        super().__init__()
        first, last = blocks[0][0], blocks[-1][1]
        self.stem = nn.Conv2d(1, first, 3, 2, 1, bias=False)
        self.blocks = nn.Sequential(*(Block(*shape) for shape in blocks))
        self.norm = nn.BatchNorm2d(last)
        self.head = nn.Linear(last, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.stem(pixels))
        logits: torch.Tensor = self.head(F.relu(self.norm(h)).mean((2, 3)))
        return logits


def convnet() -> Convnet:
    return Convnet((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1))


def deep_convnet() -> Convnet:
    """Two blocks a resolution."""
    return Convnet((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))


class VisionTransformer(nn.Module):
    """pixels_B1HW -> logits: square patches as tokens (Dosovitskiy et al. 2020), averaged at the end."""

    def __init__(self, patch: int = 7, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x_BTD = self.patches(pixels).flatten(2).mT + self.places
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: torch.Tensor = self.head(self.norm(x_BTD).mean(1))
        return logits
