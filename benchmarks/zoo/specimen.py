"""A specimen: a guide, what it reads, and what it is asked to become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY, LENGTH, IMAGE = 64, 12, 32
WIDTH, HEADS = 32, 4
SEQUENCE, VISION = ("rnn", "narrow"), ("mlp", "conv")  # targets

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """`inputs(batch, length, seed)` by the names of forward. `targets`: what it is asked to become."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    targets: tuple[str, ...]
    lengths: bool = True  # other lengths than the traced one run

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():  # configurations begin with weights so small that layers hardly speak
            for p in model.parameters():
                if p.ndim > 1 and p.is_floating_point():
                    p.mul_(2.0)
        return model


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(batch: int, length: int, seed: int, low: int = 3) -> torch.Tensor:
    return torch.randint(low, VOCABULARY, (batch, length), generator=generator(seed))


def tokens(batch: int, length: int, seed: int) -> Inputs:
    return {"input_ids": ids(batch, length, seed)}


def masked(batch: int, length: int, seed: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": ids(batch, length, seed), "attention_mask": mask}


def seq2seq(batch: int, length: int, seed: int) -> Inputs:
    return {"input_ids": ids(batch, length, seed), "decoder_input_ids": ids(batch, length + 1, seed + 1)}


def image(size: int = IMAGE) -> Callable[[int, int, int], Inputs]:
    return lambda batch, length, seed: {"pixel_values": torch.randn(batch, 3, size, size, generator=generator(seed))}


def wave(batch: int, length: int, seed: int) -> Inputs:
    return {"input_values": torch.randn(batch, 1600, generator=generator(seed))}


def vectors(name: str, width: int) -> Callable[[int, int, int], Inputs]:
    return lambda batch, length, seed: {name: torch.randn(batch, length, width, generator=generator(seed))}


def cast(build: Callable[[], nn.Module], dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: build().to(dtype)
