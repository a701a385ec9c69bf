"""Convolutional blocks as people write them, small, with norms that have seen data; each in a network with a head.

B batch, C channels
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def convolved(into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type = nn.ReLU) -> nn.Module:
    conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act())


class Basic(nn.Module):
    """A residual block, rectified after the sum."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        reshapes = stride > 1 or into != out
        self.down = nn.Conv2d(into, out, 1, stride, bias=False) if reshapes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class PreActivated(nn.Module):
    """Norm and activation before each convolution, nothing after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.leaky_relu(self.bn2(self.conv1(F.leaky_relu(self.bn1(x), 0.2))), 0.2))


class Inverted(nn.Module):
    """Expand, convolve each channel by itself, gate it by its mean, project."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        hidden = 4 * into
        self.expand, self.depthwise = convolved(into, hidden, 1), convolved(hidden, hidden, 3, stride, hidden, nn.SiLU)
        self.squeeze, self.excite = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)
        self.project, self.bn = nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)
        self.adds = stride == 1 and into == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(F.relu6(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = self.bn(self.project(y))
        return x + y if self.adds else y


class Grouped(nn.Module):
    """A norm of groups of channels, and what they give, squared or not."""

    def __init__(self, width: int, squared: bool = False) -> None:
        super().__init__()
        self.squared = squared
        self.conv1, self.norm, self.conv2 = (
            nn.Conv2d(width, width, 3, 1, 1),
            nn.GroupNorm(4, width),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.conv1(x)))
        return x + self.conv2(y.square() if self.squared else y)


class Next(nn.Module):
    """A depthwise convolution, and an MLP at each place with channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gamma * self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


class Fire(nn.Module):
    """Squeeze, and expand by two kernels side by side."""

    def __init__(self, into: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(into, squeezed, 1)
        self.one, self.three = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class Dense(nn.Module):
    """What it makes stands beside what it reads."""

    def __init__(self, into: int, growth: int = 8) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(into), nn.Conv2d(into, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))], 1)


class OverTime(nn.Module):
    """A residual block over time, with kernels that no padding centres."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv1d(width, 2 * width, 5, padding="same"), nn.BatchNorm1d(2 * width)
        self.slope, self.conv2 = nn.PReLU(2 * width), nn.Conv1d(2 * width, width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.pad(self.slope(self.bn(self.conv1(x))), (2, 1)))


class Gated(nn.Module):
    """Tokens, convolved over time with channels first: half of what they expand to gates the other half."""

    def __init__(self, width: int, kernel: int = 5) -> None:
        super().__init__()
        hidden = 2 * width
        self.norm, self.up = nn.LayerNorm(width), nn.Conv1d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.bn, self.down = nn.BatchNorm1d(hidden), nn.Conv1d(hidden, width, 1)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        y = F.glu(self.up(self.norm(x_BTC).transpose(1, 2)), 1)
        return x_BTC + self.down(F.silu(self.bn(self.depthwise(y)))).transpose(1, 2)


class GatedMap(nn.Module):
    """Half of a map that was convolved channel by channel, times the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.depthwise(self.up(x)).chunk(2, dim=1)
        return x + self.down(F.gelu(a) * b)


class Shuffled(nn.Module):
    """Half of the channels go by, and then all of them change places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(convolved(half, 2 * half, 1), convolved(2 * half, half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=1)
        y = torch.cat([a, self.body(b)], 1)
        batch, channels, height, width = y.shape
        return y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class Mixed(nn.Module):
    """An MLP of tokens that are laid out as an image and convolved between its two maps."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side, hidden = side, 4 * width
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        y = self.up(self.norm(x_BTC)).transpose(1, 2)
        y = self.depthwise(y.view(*y.shape[:2], self.side, self.side)).flatten(2).transpose(1, 2)
        return x_BTC + self.down(F.gelu(y))


class Tokens(nn.Module):
    """Places of a map or a line in a row, blocks that read (batch, tokens, width), and classes of their mean."""

    def __init__(self, patches: nn.Module, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.patches, self.body, self.head = patches, nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Headed(nn.Module):
    """Means of the last map, and classes."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.head(x.mean(tuple(range(2, x.ndim))))


def plain() -> nn.Module:
    """As VGG has it: convolutions, some with a pool behind."""
    layers: list[nn.Module] = []
    for into, out, pools in ((3, 16, False), (16, 16, True), (16, 32, False), (32, 32, True)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pools else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 5))


def separable() -> nn.Module:
    pairs = [m for _ in range(3) for m in (convolved(16, 16, groups=16), convolved(16, 16, 1))]
    return Headed(convolved(3, 16), *pairs, width=16)


def vectors() -> nn.Module:
    """Linear maps in a row, normed or not, as tables of numbers are read."""
    layers: list[nn.Module] = []
    for into, normed in ((6, True), (32, False), (32, True)):
        layers += [nn.Linear(into, 32), *([nn.BatchNorm1d(32)] if normed else []), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(32, 5))


MAP, LINE = (3, 16, 16), (4, 24)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic": (lambda: Headed(convolved(3, 16), Basic(16, 16), Basic(16, 32, 2), width=32), MAP),
    "pre-activated": (lambda: Headed(nn.Conv2d(3, 16, 3), *(PreActivated(16) for _ in range(2)), width=16), MAP),
    "inverted": (lambda: Headed(convolved(3, 8), Inverted(8, 8), Inverted(8, 12, 2), width=12), MAP),
    "next": (lambda: Headed(nn.Conv2d(3, 8, 2, 2), Next(8), Next(8), width=8), MAP),
    "fire": (lambda: Headed(nn.Conv2d(3, 16, 3, 2), Fire(16, 16, 16), Fire(32, 16, 16), width=32), MAP),
    "dense": (lambda: Headed(nn.Conv2d(3, 8, 3), Dense(8), Dense(16), width=24), MAP),
    "over time": (lambda: Headed(nn.Conv1d(4, 16, 3), OverTime(16), OverTime(16), width=16), LINE),
    "plain": (plain, MAP),
    "grouped": (lambda: Headed(nn.Conv2d(3, 16, 3), Grouped(16), Grouped(16), width=16), MAP),
    "squared": (lambda: Headed(nn.Conv2d(3, 16, 3), Grouped(16, True), Grouped(16, True), width=16), MAP),
    "separable": (separable, MAP),
    "vectors": (vectors, (6,)),
    "gated": (lambda: Tokens(nn.Conv1d(4, 8, 3), Gated(8), Gated(8), width=8), LINE),
    "gated map": (lambda: Headed(nn.Conv2d(3, 8, 3), GatedMap(8), GatedMap(8), width=8), MAP),
    "shuffled": (lambda: Headed(nn.Conv2d(3, 16, 3), Shuffled(16), Shuffled(16), width=16), MAP),
    "mixed": (lambda: Tokens(nn.Conv2d(3, 8, 4, 4), Mixed(8, 4), Mixed(8, 4), width=8), MAP),
}


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """One of them, and the shape of an example."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().train()
        for _ in range(3):
            model(torch.randn(16, *shape))
    return model.eval(), shape
