"""Guides written by hand, with what real code does in forward.

B batch, T time, D width, C channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.zoo.specimen import (
    HEADS,
    SEQUENCE,
    VISION,
    VOCABULARY,
    WIDTH,
    Inputs,
    Specimen,
    cast,
    generator,
    image,
    masked,
    tokens,
    vectors,
)


class Recurrent(nn.Module):
    """A table, a stack of cells, a head."""

    def __init__(self, cell: type[nn.RNN] | type[nn.GRU] | type[nn.LSTM], bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.cell = cell(WIDTH, WIDTH, 2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear((1 + bidirectional) * WIDTH, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.cell(self.table(input_ids))[0])
        return out


class Encoder(nn.Module):
    """torch's own encoder with padding; `how` says where the mask comes from."""

    def __init__(self, how: str, norm_first: bool = False) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = attention_mask == 0
        if self.how == "lengths":
            lengths = attention_mask.sum(1)
            hidden = torch.arange(input_ids.shape[1], device=input_ids.device) >= lengths[:, None]
        out = self.encoder(self.table(input_ids), src_key_padding_mask=hidden)
        if self.how == "pooled":
            seen = attention_mask[..., None].to(out.dtype)
            out = (out * seen).sum(1) / seen.sum(1)
        result: torch.Tensor = self.head(out)
        return result


class Gpt(nn.Module):
    """A causal model as people write it: packed projections, a triangular buffer, scores by hand."""

    def __init__(self, rotary: bool = False, groups: int = HEADS) -> None:
        super().__init__()
        self.rotary, self.groups, self.width = rotary, groups, WIDTH // HEADS
        self.table, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(WIDTH), "norm2": nn.LayerNorm(WIDTH),
                "qkv": nn.Linear(WIDTH, WIDTH + 2 * groups * self.width), "out": nn.Linear(WIDTH, WIDTH),
                "up": nn.Linear(WIDTH, 2 * WIDTH), "down": nn.Linear(2 * WIDTH, WIDTH),
            })
            for _ in range(2)
        )  # fmt: skip
        self.causal = nn.Buffer(torch.ones(64, 64, dtype=torch.bool).tril())
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def turned(self, x_BHTC: torch.Tensor) -> torch.Tensor:
        if not self.rotary:
            return x_BHTC
        angle_TP = torch.arange(x_BHTC.shape[2])[:, None] * 0.1 ** torch.arange(self.width // 2)
        pairs = torch.view_as_complex(x_BHTC.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_TP), angle_TP)).flatten(-2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        time = input_ids.shape[1]
        x = self.table(input_ids)
        if not self.rotary:
            x = x + self.places(torch.arange(time, device=input_ids.device))
        for block in self.blocks:
            query, key, value = block["qkv"](block["norm"](x)).split(
                [WIDTH, self.groups * self.width, self.groups * self.width], -1
            )
            query, key, value = (z.unflatten(-1, (-1, self.width)).transpose(1, 2) for z in (query, key, value))
            key, value = (z.repeat_interleave(HEADS // self.groups, 1) for z in (key, value))
            scores = self.turned(query) @ self.turned(key).transpose(-1, -2) / self.width**0.5
            scores = scores.masked_fill(~self.causal[:time, :time], -torch.inf)
            x = x + block["out"]((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        logits: torch.Tensor = self.head(x)
        return logits


class Temporal(nn.Module):
    """A causal convolutional network over channels-first sequences."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(6, 16)
        self.layers = nn.ModuleList(nn.Conv1d(16, 16, 3, dilation=2**k) for k in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).transpose(1, 2)
        for k, layer in enumerate(self.layers):
            reach = 2 * 2**k
            past = F.pad(x, (reach, 0)) if self.how == "pad" else torch.cat([x.new_zeros(*x.shape[:2], reach), x], 2)
            x = x + layer(past).relu()
        out: torch.Tensor = self.head(x.transpose(1, 2))
        return out


class Mixing(nn.Module):
    """Tokens mixed without a matrix."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "fourier":
            return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real
        if self.how == "mean":
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x.roll(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.mixed(x)
            x = x + layer(x).relu()
        out: torch.Tensor = self.head(x)
        return out


class Heads(nn.Module):
    """Policy and value beside each other, as agents have them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()
        )
        self.policy, self.value = nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(x)
        return {"logits": self.policy(x), "value": self.value(x)}


class Convnet(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = (x + block(x)).relu()
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


class Lora(nn.Module):
    """An adapter beside a frozen linear layer, as PEFT puts it there."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + 2.0 * self.up(self.down(x))
        return out


def _adapted() -> nn.Module:
    guide = Gpt()
    for block in guide.blocks:
        block["qkv"] = Lora(block["qkv"])
    return guide


def hand_written() -> Iterator[Specimen]:
    for cell in (nn.LSTM, nn.GRU, nn.RNN):
        for both in (False, True):
            name = f"{'bidirectional ' if both else ''}{cell.__name__}"
            yield Specimen(name=name, build=partial(Recurrent, cell, both), inputs=tokens, targets=("rnn", "gru"))
    for how in ("mask", "lengths", "pooled"):
        yield Specimen(name=f"TransformerEncoder, {how}", build=partial(Encoder, how), inputs=masked, targets=SEQUENCE)
    before = partial(Encoder, "mask", True)
    yield Specimen(name="TransformerEncoder, norm first", build=before, inputs=masked, targets=SEQUENCE)
    written: dict[str, Callable[[], Any]] = {
        "": Gpt, ", compiled": lambda: torch.compile(Gpt()), ", DataParallel": lambda: nn.DataParallel(Gpt()),
        ", with adapters": _adapted, ", float16": cast(Gpt, torch.float16),
        ", complex rotation": partial(Gpt, True, 2),
    }  # fmt: skip
    for how, build in written.items():
        yield Specimen(name=f"hand-written GPT{how}", build=build, inputs=tokens, targets=SEQUENCE)
    for how in ("pad", "cat"):
        name, build = f"causal convolutions, {how}", partial(Temporal, how)
        yield Specimen(name=name, build=build, inputs=vectors("x", 6), targets=("rnn", "gru"))
    for how in ("fourier", "mean", "roll"):
        name, build = f"mixing by {how}", partial(Mixing, how)
        yield Specimen(name=name, build=build, inputs=vectors("x", 16), targets=("rnn", "conv"))
    yield Specimen(name="policy and value", build=Heads, inputs=_states, targets=("mlp", "linear"), lengths=False)
    yield Specimen(name="residual convnet", build=Convnet, inputs=image(16), targets=VISION, lengths=False)


def _states(batch: int, length: int, seed: int) -> Inputs:
    return {"x": torch.randn(batch, 12, generator=generator(seed))}
