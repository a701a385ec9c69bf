"""Small guides that the tests share, built from configurations with seeded weights; nothing is downloaded.

B batch, T time, D width, C channels
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

VOCABULARY = 32
LENGTH = 10


def tokens(batch: int = 4, time: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """ids_BT below VOCABULARY."""
    return torch.randint(0, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def token_batches(count: int = 4, batch: int = 4, time: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(batch, time, seed)} for seed in range(count)]


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(count: int = 4, *shape: int, classes: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, y) with integer y."""
    return [
        (vectors(*shape, seed=k), torch.randint(0, classes, shape[:1], generator=torch.Generator().manual_seed(k)))
        for k in range(count)
    ]


def gpt2(layers: int = 2, width: int = 16, heads: int = 2, attention: str = "sdpa", **settings: Any) -> nn.Module:
    """A causal language model whose head is tied to its table of tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, n_positions=64, n_embd=width, n_layer=layers, n_head=heads)
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation=attention, **settings)
    return spread(GPT2LMHeadModel(config).eval())


def bert(layers: int = 2, width: int = 16, heads: int = 2, attention: str = "sdpa") -> nn.Module:
    """A bidirectional encoder with a mask input."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width)
    config = BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, attn_implementation=attention, pad_token_id=0, **sizes
    )
    return spread(BertModel(config, add_pooling_layer=False).eval())


def llama(layers: int = 2, width: int = 32, heads: int = 4, groups: int = 2, attention: str = "sdpa") -> nn.Module:
    """A causal language model with rotary positions and grouped keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        attn_implementation=attention,
        attention_bias=True,
        **sizes,
    )
    return spread(LlamaForCausalLM(config).eval())


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Larger weights and biases than an initialisation's, so that no activation is nearly constant or zero."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim >= 2 else 0.1))
    return model


class Calling(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class CallingTwo(nn.Module):
    """A function of two tensors as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


class EncoderClassifier(nn.Module):
    """x_BTD -> logits_BC through nn.TransformerEncoder."""

    def __init__(self, width: int = 16, heads: int = 2, layers: int = 2, classes: int = 5) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


def encoder(**settings: int) -> nn.Module:
    torch.manual_seed(0)
    return EncoderClassifier(**settings).eval()


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); the shortcut is a convolution where the stage changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and channels_in == channels
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """image_B1HW -> logits_BC, three stages of two blocks."""

    def __init__(self, channels: tuple[int, ...] = (4, 8, 8), classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels[0], 3, 1, 1)
        blocks: list[nn.Module] = []
        before = channels[0]
        for stage, width in enumerate(channels):
            blocks += [Block(before, width, 1 if stage == 0 else 2), Block(width, width, 1)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(image))).mean((2, 3)))


def resnet(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(**settings).eval()


def mlp(width: int = 8, classes: int = 5, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes)).eval()


def convnet(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes),
    ).eval()  # fmt: skip


class Functional(nn.Module):
    """Residual blocks without submodules: x + tanh(x W_k) V_k."""

    def __init__(self, width: int = 8, depth: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.up = nn.ParameterList(nn.Parameter(torch.randn(width, 2 * width) * 0.3) for _ in range(depth))
        self.down = nn.ParameterList(nn.Parameter(torch.randn(2 * width, width) * 0.3) for _ in range(depth))
        self.head = nn.Parameter(torch.randn(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + torch.tanh(x @ up) @ down
        return x @ self.head


def functional(**settings: int) -> nn.Module:
    torch.manual_seed(0)
    return Functional(**settings).eval()


class TokenMixer(nn.Module):
    """x_BTD -> y_BTD: a causal running mean and a token-wise branch a layer; no attention."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.wise = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )
        self.head = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mix, wise in zip(self.mix, self.wise, strict=True):
            x = x + mix(x).cumsum(1) * 0.2
            x = x + wise(x)
        return self.head(x)


def token_mixer(**settings: int) -> nn.Module:
    torch.manual_seed(0)
    return TokenMixer(**settings).eval()


class Tabled(nn.Module):
    """ids_BT -> y_BTD: a TokenMixer on tokens and a table of 64 positions, the least of a causal language model."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.mixer = TokenMixer(width, layers)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mixer(self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1])))


class FixedLength(nn.Module):
    """A guide that takes sequences of one length and no other, so that its time dimension is static."""

    def __init__(self, guide: nn.Module, length: int, width: int) -> None:
        super().__init__()
        self.guide, self.length, self.width = guide, length, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.guide(x.reshape(x.shape[0], self.length, self.width))


class TwoInputs(nn.Module):
    """(left, right) -> one output; the blocks run on their sum."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.left = nn.Linear(width, width)
        self.right = nn.Linear(width, width)
        self.body = mlp(width)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.body(torch.tanh(self.left(left)) + torch.tanh(self.right(right)))


class TwoOutputs(nn.Module):
    """x -> {"first": ..., "second": (..., ...)}; both leave the same body."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = mlp(width, width)
        self.first = nn.Linear(width, 3)
        self.second = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.body(x))
        return {"first": self.first(hidden), "second": (self.second(hidden), hidden)}


class Tied(nn.Module):
    """Three residual layers that share one weight, and a head that shares it too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.head = nn.Linear(width, width, bias=False)
        self.second.weight = self.third.weight = self.head.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second, self.third):
            x = x + torch.tanh(layer(x))
        return self.head(x)


def seeded(cls: type[nn.Module], *args: Any, **settings: Any) -> nn.Module:
    """An instance with the same weights each time, in eval mode."""
    torch.manual_seed(0)
    return cls(*args, **settings).eval()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy to compare with later."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)
