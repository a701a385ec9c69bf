"""What the documents take for granted: a guide, its batches and a loss, as small as they can be. Not a test.

The blocks of a document find `model`, `batches` and `held_out`, `convnet` and `images`; its command lines find them
here, as my_models:guide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def guide() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # tokens that tell each other apart, so that greedy decoding isn't a toss-up
    return model


def batches(count: int = 4, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 32, (4, 12), generator=generator)} for _ in range(count)]


def loss(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": batch["input_ids"]}


def convnet() -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for into, out in ((1, 16), (16, 16), (16, 16)):
        layers += [torch.nn.Conv2d(into, out, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(16 * 64, 5)).eval()


def images(count: int = 4, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(count)]
