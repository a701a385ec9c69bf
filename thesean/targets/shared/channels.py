"""A stretch of a convolutional network as steps that keep channels apart or mix them, and which channels are its own.

What a step reads are values by number: 0 is the input, and step i makes value i + 1. Channels that an elementwise step,
a norm, a pool or a depthwise convolution hands on one by one are the same channels, and so are those of values that are
added or multiplied. Such a group of channels can lose some where it is neither the input's nor the output's, and all
that makes and reads it is known: plain convolutions, of which rows and columns go.

B batch, C channels, O output channels, I input channels, K taps of a kernel
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch.nn import functional as F

from thesean.targets.shared.activations import ACTIVATIONS

Sizes = tuple[Annotated[int, Field(ge=0)], ...]


class _Step(BaseModel):
    """`of`: the value that it reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    of: int = Field(ge=0)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.of,)


class Convolution(_Step):
    """weight, bias. Depthwise: each channel by itself; in `groups` that are neither one nor as many as channels, what
    channels there are can't change.
    """

    kind: Literal["convolution"] = "convolution"
    channels_in: int = Field(gt=0)
    channels_out: int = Field(gt=0)
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int = Field(default=1, gt=0)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels_in == self.channels_out > 1

    @property
    def mixes(self) -> bool:
        """Whether every output channel reads every input channel."""
        return self.groups == 1


class Scale(_Step):
    """weight x + bias, a number each a channel: a norm by statistics of the data, once they stand still."""

    kind: Literal["scale"] = "scale"
    channels: int = Field(gt=0)


class Slope(_Step):
    """x above zero, weight x below: a rectifier whose slope was learnt, for each channel."""

    kind: Literal["slope"] = "slope"
    channels: int = Field(gt=0)


class Activate(_Step):
    """An activation by its name, or a clamp between two numbers, or a rectifier with a slope below zero."""

    kind: Literal["activate"] = "activate"
    name: str
    low: float | None = None
    high: float | None = None
    slope: float | None = None


class Pool(_Step):
    """The largest or the mean of each window."""

    kind: Literal["pool"] = "pool"
    form: Literal["max", "average"]
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes = ()
    ceil: bool = False
    counts_padding: bool = True


class Average(_Step):
    """The mean of a map, or of as many windows as `size` says."""

    kind: Literal["average"] = "average"
    size: Sizes


class Pad(_Step):
    """Zeros at the borders, or fewer of the border; before and after, the last dimension first."""

    kind: Literal["pad"] = "pad"
    sizes: tuple[int, ...]


class Norm(_Step):
    """The layer norm of the channels at each place: weight, bias."""

    kind: Literal["norm"] = "norm"
    channels: int = Field(gt=0)
    eps: float = Field(ge=0)


class Concatenate(_Step):
    """The channels of several values, one after another."""

    kind: Literal["concatenate"] = "concatenate"
    others: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.of, *self.others)


class Join(_Step):
    """Two values added or multiplied; one may have one number a channel."""

    kind: Literal["join"] = "join"
    other: int = Field(ge=0)
    form: Literal["sum", "product"]

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.of, self.other)


Step = Annotated[
    Convolution | Scale | Slope | Activate | Pool | Average | Pad | Norm | Concatenate | Join,
    Field(discriminator="kind"),
]
_STEPS: TypeAdapter[tuple[Step, ...]] = TypeAdapter(tuple[Step, ...])


def read_steps(told: object) -> tuple[Step, ...]:
    """From JSON values. Raises ValueError for what is none of the steps, and for values that are read before they are
    made.
    """
    steps = _STEPS.validate_python(told)
    for number, step in enumerate(steps):
        if any(read > number for read in step.reads):
            raise ValueError(f"step {number} reads value {max(step.reads)}, which is made later")
        if isinstance(step, Activate) and step.name not in {*ACTIVATIONS, "clamp"}:
            raise ValueError(f"unknown activation {step.name!r}; known: {', '.join(ACTIVATIONS)}, clamp")
        if isinstance(step, Convolution) and (step.channels_in % step.groups or step.channels_out % step.groups):
            raise ValueError(
                f"step {number}: {step.channels_in} to {step.channels_out} channels in {step.groups} groups"
            )
        if isinstance(step, Convolution) and len({len(s) for s in _geometry(step)}) > 1:
            raise ValueError(f"step {number}: a kernel, a stride, a padding and a dilation of as many dimensions")
    if not steps:
        raise ValueError("no step")
    return steps


def _geometry(step: Convolution) -> tuple[Sizes, ...]:
    return step.kernel, step.stride, step.padding, step.dilation


class Weights(NamedTuple):
    """Of one step: a weight, and a bias where the step has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def to(self, as_what: torch.dtype | str) -> Weights:
        """In another precision, or on another device."""
        return Weights(self.weight.to(as_what), None if self.bias is None else self.bias.to(as_what))


_Map = Callable[..., torch.Tensor]
_CONVOLVE: dict[int, _Map] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX: dict[int, _Map] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, _Map] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: dict[int, _Map] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def run_step(step: Step, weights: Weights | None, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """One step's value; the weights say how many channels there are."""
    dims = x.ndim - 2
    if isinstance(step, Convolution):
        assert weights is not None
        groups = len(weights.weight) if step.depthwise else step.groups
        return _CONVOLVE[dims](
            x, weights.weight, weights.bias, stride=step.stride, padding=step.padding, dilation=step.dilation,
            groups=groups,
        )  # fmt: skip
    if isinstance(step, Scale):
        assert weights is not None
        assert weights.bias is not None
        by_channel = (-1, *[1] * dims)
        return x * weights.weight.view(by_channel) + weights.bias.view(by_channel)
    if isinstance(step, Slope):
        assert weights is not None
        return F.prelu(x, weights.weight)
    if isinstance(step, Activate):
        if step.name == "clamp":
            return x.clamp(step.low, step.high)
        if step.slope is not None:
            return F.leaky_relu(x, step.slope)
        return ACTIVATIONS[step.name](x)
    if isinstance(step, Pool):
        if step.form == "max":
            return _MAX[dims](x, step.kernel, step.stride, step.padding, step.dilation or 1, ceil_mode=step.ceil)
        return _MEAN[dims](x, step.kernel, step.stride, step.padding, step.ceil, step.counts_padding)
    if isinstance(step, Average):
        if all(size == 1 for size in step.size):
            return x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return _ADAPTIVE[dims](x, step.size)
    if isinstance(step, Pad):
        return F.pad(x, step.sizes)
    if isinstance(step, Norm):
        assert weights is not None
        return F.layer_norm(x.movedim(1, -1), (step.channels,), *weights, eps=step.eps).movedim(-1, 1)
    if isinstance(step, Concatenate):
        return torch.cat([x, *others], 1)
    (other,) = others
    return x + other if step.form == "sum" else x * other


def run_steps(
    steps: Sequence[Step], weights: Mapping[int, Weights], x: torch.Tensor, wanted: int | None = None
) -> torch.Tensor:
    """Value `wanted`, the last one by default; what it doesn't need is not computed."""
    wanted = len(steps) if wanted is None else wanted
    needed = needs(steps, wanted)
    values = {0: x}
    for number, step in enumerate(steps):
        if number + 1 in needed:
            read = [values[of] for of in step.reads]
            values[number + 1] = run_step(step, weights.get(number), *read)
    return values[wanted]


def needs(steps: Sequence[Step], wanted: int) -> set[int]:
    """The values that one is computed from, itself included."""
    needed, front = {wanted}, [wanted]
    while front:
        value = front.pop()
        above = set(steps[value - 1].reads) - needed if value else set()
        needed |= above
        front.extend(above)
    return needed


@dataclass(frozen=True)
class Channels:
    """A group of channels that can lose some: those values are its own, and those steps make, hand on and read it."""

    count: int
    values: frozenset[int]
    makers: tuple[int, ...]  # convolutions whose rows they are
    along: tuple[int, ...]  # steps that have numbers of their own for each of them
    readers: tuple[int, ...]  # convolutions whose columns they are


class Map(NamedTuple):
    """How many channels a value has, and how many places."""

    channels: int
    places: int


def inner_channels(steps: Sequence[Step], maps: Sequence[Map]) -> tuple[Channels, ...]:
    """The groups that can lose channels, first to last, where the values are such `maps`.

    Channels that are seen as means of the map alone, as between a gate's two layers, cost nothing and stay.
    """
    group = list(range(len(steps) + 1))

    def root(value: int) -> int:
        while group[value] != value:
            value = group[value]
        return value

    def same(a: int, b: int) -> None:
        first, second = sorted((root(a), root(b)))
        group[second] = first

    fixed: set[int] = {0, len(steps)}
    for number, step in enumerate(steps):
        if isinstance(step, Convolution):
            if step.depthwise:
                same(step.of, number + 1)
            elif not step.mixes:
                fixed |= {step.of, number + 1}
            continue
        if isinstance(step, (Norm, Concatenate)):  # all of its channels meet, or stand in a place of their own
            fixed |= {*step.reads, number + 1}
            continue
        for read in step.reads:
            if maps[read].channels == maps[number + 1].channels:
                same(read, number + 1)
            else:  # one channel for all
                fixed.add(read)
    fixed = {root(value) for value in fixed}
    found = []
    for first in sorted({root(v) for v in range(len(steps) + 1)} - fixed):
        values = frozenset(v for v in range(len(steps) + 1) if root(v) == first)
        if max(maps[v].places for v in values) == 1:
            continue
        makers = [n for n, s in enumerate(steps) if n + 1 in values and isinstance(s, Convolution) and s.mixes]
        along = [n for n, s in enumerate(steps) if n + 1 in values and n not in makers and _has_weights(s)]
        readers = [n for n, s in enumerate(steps) if isinstance(s, Convolution) and s.mixes and s.of in values]
        counts = {_made(steps[n]) for n in makers}
        if makers and readers and len(counts) == 1:
            found.append(Channels(counts.pop(), values, tuple(makers), tuple(along), tuple(readers)))
    return tuple(found)


def _made(step: Step) -> int:
    assert isinstance(step, Convolution)
    return step.channels_out


def _has_weights(step: Step) -> bool:
    return isinstance(step, (Convolution, Scale)) or (isinstance(step, Slope) and step.channels > 1)


@dataclass(frozen=True, kw_only=True)
class ChannelFacts:
    """A part that maps feature maps, read off the graph: its steps, their weights, and what each value is."""

    steps: tuple[Step, ...]
    weights: Mapping[int, Weights]
    maps: tuple[Map, ...]

    @property
    def inner(self) -> tuple[Channels, ...]:
        return inner_channels(self.steps, self.maps)


def narrowed(steps: Sequence[Step], inner: Sequence[Channels], counts: Sequence[int]) -> tuple[Step, ...]:
    """The same steps where each group has so many channels."""
    changed = list(steps)
    for channels, count in zip(inner, counts, strict=True):
        for number in channels.makers:
            changed[number] = changed[number].model_copy(update={"channels_out": count})
        for number in channels.readers:
            changed[number] = changed[number].model_copy(update={"channels_in": count})
        for number in channels.along:
            step = changed[number]
            both = {"channels_in": count, "channels_out": count, "groups": count}
            changed[number] = step.model_copy(update=both if isinstance(step, Convolution) else {"channels": count})
    return tuple(changed)


def keep_rows(weights: dict[int, Weights], channels: Channels, kept_S: torch.Tensor) -> None:
    """In place: what makes a group and hands it on, with the channels that are kept."""
    for number in (*channels.makers, *channels.along):
        weight, bias = weights[number]
        weights[number] = Weights(weight[kept_S], None if bias is None else bias[kept_S])
