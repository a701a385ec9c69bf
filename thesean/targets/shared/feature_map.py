"""What the families for feature maps share: windows, the shapes they take, and the frame around a solvable last layer.

B batch, C channels, H height, W width, E hidden channels, F features of the last layer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Required, TypedDict, Unpack

import torch
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.module import State, TargetModule
from thesean.targets.shared.norms import BatchNorm, standardise
from thesean.targets.shared.sequence import SmallLinear, describe

# What the block adds to its own output: nothing, its input, or a linear map of its averaged input
Shortcut = Literal["none", "identity", "projection"]
MapNorm = Literal["batch", "group", "none"]


class Windows:
    """One window an output pixel, centred on the map, so that any size can become any smaller one.

    The stride is the ratio of the sizes, rounded. The first and the last window are equally far from the borders: what
    they lack is padded, what they leave over is cropped. For k odd this puts them where a padded convolution has them.
    `kernel` None: windows that don't overlap, for averages.
    """

    def __init__(self, size_in: Sequence[int], size_out: Sequence[int], kernel: int | None) -> None:
        """`size_in` and `size_out` are (H, W)."""
        (height_in, width_in), (height_out, width_out) = size_in, size_out
        self.stride = (round(height_in / height_out), round(width_in / width_out))
        self.kernel = self.stride if kernel is None else (kernel, kernel)
        missing = [(b - 1) * s + k - a for a, b, s, k in zip(size_in, size_out, self.stride, self.kernel, strict=True)]
        before = [-(-m // 2) for m in missing]
        # A convolution pads both ends alike. One more at the end is harmless while it makes no further window.
        alike = kernel is not None and all(
            p >= 0 and (a + 2 * p - k) // s + 1 == b
            for p, a, b, s, k in zip(before, size_in, size_out, self.stride, self.kernel, strict=True)
        )
        self.padding = (before[0], before[1]) if alike else (0, 0)
        # (top, bottom), (left, right) that are left to do by hand; negative ones are cropped
        self.borders = [(0, 0) if alike else (p, m - p) for p, m in zip(before, missing, strict=True)]

    def place(self, x_BCHW: torch.Tensor, mode: str = "constant") -> torch.Tensor:
        """The map with its borders as the windows want them."""
        for dim, (before, after) in zip((2, 3), self.borders, strict=True):
            if before < 0 or after < 0:
                start, size = max(0, -before), x_BCHW.shape[dim]
                x_BCHW = x_BCHW.narrow(dim, start, size - start - max(0, -after))
        (top, bottom), (left, right) = [[max(0, p) for p in pair] for pair in self.borders]
        if top or bottom or left or right:
            x_BCHW = F.pad(x_BCHW, (left, right, top, bottom), mode=mode)
        return x_BCHW

    def average(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The mean of each window; what the borders lack repeats the last pixel."""
        x_BCHW = self.place(x_BCHW, "replicate")
        return F.avg_pool2d(x_BCHW, self.kernel, self.stride) if max(self.stride) > 1 else x_BCHW


class MapFrame(TypedDict, total=False):
    """The constructor arguments that all targets for feature maps have; shapes are (C, H, W)."""

    input_shape: Required[list[int]]
    output_shape: Required[list[int]]
    width: Required[int]
    shortcut: Shortcut
    final_relu: bool


class SpatialTarget(TargetModule):
    """y = relu(last(windows of hidden(x), and averages of x) + x): subclasses say what `hidden` is.

    `last` reads `window` x `window` patches of the hidden map, channels last, and is solved in closed form as a linear
    map; forward runs the same weights as a convolution. A shape that changes has a "projection" shortcut (He et al.
    2015, option B), whose weights are columns of `last`, so that it is solved as well. With `final_relu` the sum is
    solved and then rectified: the wanted output is nowhere negative, so that a relu brings each pixel nearer to it.
    """

    window: ClassVar[int] = 1

    def __init__(
        self,
        *,
        input_shape: list[int],
        output_shape: list[int],
        width: int,
        shortcut: Shortcut = "none",
        final_relu: bool = False,
    ) -> None:
        """`input_shape` and `output_shape` are (C, H, W)."""
        super().__init__()
        self.input_shape, self.output_shape = tuple(input_shape), tuple(output_shape)
        self.width = width
        self.shortcut = shortcut
        self.final_relu = final_relu
        self.averages = Windows(input_shape[1:], output_shape[1:], None)
        projected = input_shape[0] if shortcut == "projection" else 0
        self.last = SmallLinear(width * self.window**2 + projected, output_shape[0])
        if projected:  # a stream goes through it, so it doesn't start small
            nn.init.normal_(self.last.weight[:, -projected:].data, std=projected**-0.5)

    def config(self) -> dict[str, Any]:
        return {
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "width": self.width,
            "shortcut": self.shortcut,
            "final_relu": self.final_relu,
        }

    def hidden(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, E, H, W) at the output's resolution."""
        raise NotImplementedError(f"{type(self).__name__}.hidden")

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        hidden_BEHW = self.hidden(x)
        size = hidden_BEHW.shape[2:]
        if self.window > 1:
            patches_BFL = F.unfold(hidden_BEHW, self.window, padding=self.window // 2)
            hidden_BEHW = patches_BFL.unflatten(2, size)
        if self.shortcut == "projection":
            hidden_BEHW = torch.cat([hidden_BEHW, self.averages.average(x)], 1)
        return hidden_BEHW.movedim(1, -1), None

    def shape(self, y: torch.Tensor) -> torch.Tensor:
        return y.movedim(-1, 1)

    def unshape(self, y: torch.Tensor) -> torch.Tensor:
        return y.movedim(1, -1)

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        return x if self.shortcut == "identity" else None

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        own = self.width * self.window**2
        weight_CEKK = self.last.weight[:, :own].unflatten(1, (self.width, self.window, self.window))
        y = F.conv2d(self.hidden(x), weight_CEKK, self.last.bias, padding=self.window // 2)
        if self.shortcut == "projection":
            y = y + F.conv2d(self.averages.average(x), self.last.weight[:, own:, None, None])
        elif self.shortcut == "identity":
            y = y + x
        return y.relu() if self.final_relu else y

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        pixels = self.output_shape[1] * self.output_shape[2]  # every weight meets every output pixel once
        return 2 * part.rows(sizes) * pixels * sum(p.numel() for p in self.parameters() if p.ndim >= 2)


class ConvolvedMap(SpatialTarget):
    """hidden(x) = relu(norm(convolution(x))): one convolution that has the stride, standardised by the guide's data.

    `convolution` is the attribute that holds it, and so what its weights are saved as.
    """

    convolution: ClassVar[str]

    def __init__(self, *, kernel: int, hidden_norm: MapNorm, depthwise: bool, **frame: Unpack[MapFrame]) -> None:
        super().__init__(**frame)
        self.hidden_norm = hidden_norm
        channels, *size_in = self.input_shape
        self.places = Windows(size_in, self.output_shape[1:], kernel)
        groups = channels if depthwise else 1
        conv = nn.Conv2d(channels, self.width, kernel, self.places.stride, self.places.padding, groups=groups)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        self.add_module(self.convolution, conv)
        self.norm = make_norm(hidden_norm, self.width)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "hidden_norm": self.hidden_norm}

    def hidden(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        convolved_BEHW = self.get_submodule(self.convolution)(self.places.place(x_BCHW))
        hidden_BEHW: torch.Tensor = self.norm(convolved_BEHW).relu()
        return hidden_BEHW

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        conv = self.get_submodule(self.convolution)
        assert isinstance(conv, nn.Conv2d)
        standardise(conv, [self.places.place(x) for x, _ in examples])


def make_norm(kind: MapNorm, width: int) -> nn.Module:
    """ "group" is one group: each image by itself."""
    if kind == "batch":
        return BatchNorm(width)
    return nn.GroupNorm(1, width) if kind == "group" else nn.Identity()


def check_feature_map(target: str, part: PartFacts) -> None:
    """Raises TargetMismatchError unless the part maps (batch, C, H, W) to a map that is no larger, sizes static."""
    shapes = f"{describe(part.input_shape)} -> {describe(part.output_shape)}"
    keep = f"keep it with {part.keep}"
    if not len(part.input_shape) == len(part.output_shape) == 4:
        raise part.mismatch(
            target,
            found=shapes,
            expected="a feature map (batch, channels, height, width) in and out",
            advice=f"Choose target 'mlp' for it, or {keep}.",
        )
    if any(isinstance(dim, str) for dim in part.input_shape[1:] + part.output_shape[1:]):
        raise part.mismatch(
            target,
            found=shapes,
            expected="static channels, height and width",
            advice="Trace the guide with fixed sizes: only the batch may be dynamic.",
        )
    sizes = zip(part.input_shape[2:], part.output_shape[2:], strict=True)
    if any(int(b) > int(a) for a, b in sizes):
        raise part.mismatch(
            target,
            found=shapes,
            expected="a map that is no larger than the part's input",
            advice=f"Choose target 'mlp' for it, or {keep}.",
        )


def map_frame(part: PartFacts, width: int, residual: bool | None, final_relu: bool | None) -> MapFrame:
    """The frame of a part's module.

    `residual` None: whatever no stream outside of the part adds; `final_relu` None: where the guide has no negatives.
    """
    wanted = not part.is_branch if residual is None else residual
    same = part.input_shape[1:] == part.output_shape[1:]
    return {
        "input_shape": [int(dim) for dim in part.input_shape[1:]],
        "output_shape": [int(dim) for dim in part.output_shape[1:]],
        "width": width,
        "shortcut": "none" if not wanted else "identity" if same else "projection",
        "final_relu": part.nonnegative if final_relu is None else final_relu,
    }
