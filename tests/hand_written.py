"""Guides written by hand, each with one trait that a planner may trip over.

B batch, T time, D width, C channels, H height, W width of an image, P patches
"""

from __future__ import annotations

import torch
from torch import nn


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(channels_in, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += identity
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2016, figure 5 right)."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(channels_in, 4 * channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


def _downsample(channels_in: int, channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels_in == channels:
        return None
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class ResNetShape(nn.Module):
    """image_B3HW -> logits_BC: a stem, four stages of `depths` blocks, pooling and a head."""

    def __init__(self, depths: tuple[int, ...], bottleneck: bool, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        block = Bottleneck if bottleneck else Basic
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, depth in enumerate(depths):
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width * 2**stage, stride))
                channels = width * 2**stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class MixerBlock(nn.Module):
    """Token mixing over a fixed number of patches, then channel mixing (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.norm2 = nn.LayerNorm(width)
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """image_B3HW -> logits_BC."""

    def __init__(self, width: int = 16, layers: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(MixerBlock(9, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def post_norm_encoder(width: int = 16, heads: int = 2, layers: int = 3) -> nn.Module:
    """nn.TransformerEncoder as it is by default (post-norm), batch first, with a last norm."""
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class LSTMClassifier(nn.Module):
    """x_BTD -> logits_BC from the last hidden state of a stack of LSTMs."""

    def __init__(self, width_in: int = 8, width: int = 16, layers: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width_in, width, layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(x)
        return self.head(hidden[-1])


class LSTMTagger(nn.Module):
    """ids_BT -> logits_BTC through two LSTM modules, the second bidirectional."""

    def __init__(self, vocabulary: int = 32, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.first = nn.LSTM(width, width, batch_first=True)
        self.second = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.first(self.table(input_ids))
        x, _ = self.second(x)
        return self.head(x)


class ConvNet1d(nn.Module):
    """series_BCT -> logits_BC: dilated residual convolutions over a time series of fixed length."""

    def __init__(self, channels_in: int = 3, channels: int = 8, layers: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv1d(channels_in, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(channels, channels, 3, padding=2**k, dilation=2**k),
                nn.BatchNorm1d(channels),
                nn.ReLU(),
                nn.Conv1d(channels, channels, 1),
            )
            for k in range(layers)
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        x = self.stem(series)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean(2))


class Residual(nn.Module):
    """x + mlp(norm(x)), token-wise, after a causal running mean of a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x).cumsum(1) * 0.1
        return x + self.mlp(self.norm(x))


class TwoInputs(nn.Module):
    """(left_BTD, right_BTE) -> y_BTC: each input has a branch of its own, then both run together."""

    def __init__(self, width_left: int = 8, width_right: int = 6, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(width_left, width), Residual(width))
        self.right = nn.Sequential(nn.Linear(width_right, width), Residual(width))
        self.body = nn.ModuleList(Residual(width) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        x = self.left(left) + self.right(right)
        for block in self.body:
            x = block(x)
        return self.head(x)


class TwoOutputs(nn.Module):
    """x_BTD -> (tags_BTC, {"summary": logits_BC}): two heads leave the same body, the second from its middle."""

    def __init__(self, width_in: int = 8, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(width_in, width)
        self.body = nn.ModuleList(Residual(width) for _ in range(4))
        self.tags = nn.Linear(width, classes)
        self.summary = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = self.stem(x)
        for block in self.body[:2]:
            x = block(x)
        early = self.summary(x.mean(1))
        for block in self.body[2:]:
            x = block(x)
        return self.tags(x), {"summary": early}


class Tied(nn.Module):
    """ids_BT -> logits_BTV: the head is the table, and two blocks share the matrix of their MLPs."""

    def __init__(self, vocabulary: int = 32, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight
        self.blocks[2].mlp[0].weight = self.blocks[0].mlp[0].weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Looped(nn.Module):
    """x_BTD -> y_BTC: one block, applied three times (Dehghani et al. 2018), and its norm once more after the loop."""

    def __init__(self, width: int = 16, loops: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.block = Residual(width)
        self.loops = loops
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.loops):
            x = self.block(x)
        return self.head(self.block.norm(x))
