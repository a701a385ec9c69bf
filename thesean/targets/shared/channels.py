"""A stretch of a convolutional network as steps that keep channels apart or mix them.

What a step reads are values by number: 0 is the input, and step i makes value i + 1.

B batch, C channels, O output channels, I input channels, K taps of a kernel
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch.nn import functional as F

from thesean.targets.shared.activations import ACTIVATIONS

Sizes = tuple[Annotated[int, Field(ge=0)], ...]
Counts = tuple[Annotated[int, Field(gt=0)], ...]


class _Step(BaseModel):
    """`of`: the value that it reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    of: int = Field(ge=0)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.of,)

    def reading(self, values: Sequence[int]) -> Self:
        """The same of other values, as many as it `reads`."""
        return self.model_copy(update={"of": values[0]})


class Convolution(_Step):
    """weight, bias; of vectors, which have no places, the linear map. Of several `groups` whole ones can go, where as
    many channels go in as come out: one by one where each channel is a group. `transposed`: each place becomes as many
    as the kernel has (Zeiler et al. 2010).
    """

    kind: Literal["convolution"] = "convolution"
    channels_in: int = Field(gt=0)
    channels_out: int = Field(gt=0)
    kernel: Counts
    stride: Counts
    padding: Sizes
    dilation: Counts
    groups: int = Field(default=1, gt=0)
    transposed: bool = False
    output_padding: Sizes = ()

    @property
    def mixes(self) -> bool:
        """Whether every output channel reads every input channel, and rows and columns can go."""
        return self.groups == 1 and not self.transposed

    @property
    def block(self) -> int:
        """Channels of a group, where groups can go; or 0."""
        alike = self.groups > 1 and self.channels_in == self.channels_out and not self.transposed
        return self.channels_out // self.groups if alike else 0


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
    kernel: Counts
    stride: Counts
    padding: Sizes
    dilation: Counts = ()
    ceil: bool = False
    counts_padding: bool = True


class Average(_Step):
    """The mean of a map, or of as many windows as `size` says."""

    kind: Literal["average"] = "average"
    size: Counts


class Pad(_Step):
    """Zeros or what is near at the borders, or less than there is; before and after, the last dimension first."""

    kind: Literal["pad"] = "pad"
    sizes: tuple[int, ...]
    mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"


class Resize(_Step):
    """A map between its places, by so many times."""

    kind: Literal["resize"] = "resize"
    times: tuple[Annotated[float, Field(gt=0)], ...]
    form: Literal["nearest", "linear"]
    corners: bool = False


class Lay(_Step):
    """The places of a map in other dimensions: those of an image in a line, and of a line as an image of `size`."""

    kind: Literal["lay"] = "lay"
    size: Counts = ()


class Norm(_Step):
    """The layer norm of the channels at each place: weight, bias."""

    kind: Literal["norm"] = "norm"
    channels: int = Field(gt=0)
    eps: float = Field(ge=0)


class GroupNorm(_Step):
    """Each of several groups of channels by its own mean and variance over the map: weight, bias."""

    kind: Literal["group-norm"] = "group-norm"
    channels: int = Field(gt=0)
    groups: int = Field(gt=0)
    eps: float = Field(ge=0)

    @property
    def block(self) -> int:
        return self.channels // self.groups


class Concatenate(_Step):
    """The channels of several values, one after another."""

    kind: Literal["concatenate"] = "concatenate"
    others: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.of, *self.others)

    def reading(self, values: Sequence[int]) -> Self:
        return self.model_copy(update={"of": values[0], "others": tuple(values[1:])})


class Pick(_Step):
    """Some of the channels, or all in another order."""

    kind: Literal["pick"] = "pick"
    places: Annotated[Sizes, Field(min_length=1)]


class Join(_Step):
    """Two values added or multiplied, or the larger of them; one may have one number a channel."""

    kind: Literal["join"] = "join"
    other: int = Field(ge=0)
    form: Literal["sum", "product", "maximum"]

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.of, self.other)

    def reading(self, values: Sequence[int]) -> Self:
        return self.model_copy(update={"of": values[0], "other": values[1]})


Step = Annotated[
    Convolution
    | Scale
    | Slope
    | Activate
    | Pool
    | Average
    | Pad
    | Resize
    | Lay
    | Norm
    | GroupNorm
    | Concatenate
    | Pick
    | Join,
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
        if isinstance(step, GroupNorm) and step.channels % step.groups:
            raise ValueError(f"step {number}: {step.channels} channels in {step.groups} groups")
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
_TRANSPOSED: dict[int, _Map] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_JOINED: dict[str, _Map] = {"sum": torch.add, "product": torch.mul, "maximum": torch.maximum}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_MAX: dict[int, _Map] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, _Map] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: dict[int, _Map] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def run_step(step: Step, weights: Weights | None, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """One step's value; the weights say how many channels there are."""
    dims = x.ndim - 2
    if isinstance(step, Convolution):
        assert weights is not None
        if not dims:
            return F.linear(x, *weights)
        if step.transposed:
            return _TRANSPOSED[dims](
                x, *weights, step.stride, step.padding, step.output_padding or 0, step.groups, step.dilation
            )
        groups = len(weights.weight) * step.groups // step.channels_out if step.groups > 1 else 1
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
        return F.pad(x, step.sizes, mode=step.mode)
    if isinstance(step, Resize):
        if step.form == "nearest":
            return F.interpolate(x, scale_factor=step.times, mode="nearest")
        return F.interpolate(x, scale_factor=step.times, mode=_LINEAR[dims], align_corners=step.corners)
    if isinstance(step, Lay):
        return x.reshape(*x.shape[:2], *step.size) if step.size else x.flatten(2)
    if isinstance(step, Norm):
        assert weights is not None
        return F.layer_norm(x.movedim(1, -1), (step.channels,), *weights, eps=step.eps).movedim(-1, 1)
    if isinstance(step, GroupNorm):
        assert weights is not None
        return F.group_norm(x, len(weights.weight) // step.block, *weights, eps=step.eps)
    if isinstance(step, Concatenate):
        return torch.cat([x, *others], 1)
    if isinstance(step, Pick):
        first, count = step.places[0], len(step.places)
        in_a_row = step.places == tuple(range(first, first + count))
        return x.narrow(1, first, count) if in_a_row else x[:, list(step.places)]
    (other,) = others
    return _JOINED[step.form](x, other)


def run_steps(
    steps: Sequence[Step], weights: Mapping[int, Weights], x: torch.Tensor, wanted: int | None = None
) -> torch.Tensor:
    """Value `wanted`, the last one by default; what it doesn't need is not computed."""
    wanted = len(steps) if wanted is None else wanted
    return run_all(steps, weights, x, needs(steps, wanted))[wanted]


def run_all(
    steps: Sequence[Step], weights: Mapping[int, Weights], x: torch.Tensor, needed: Container[int] | None = None
) -> dict[int, torch.Tensor]:
    """Every value by its number, or those that are `needed`."""
    values = {0: x}
    for number, step in enumerate(steps):
        if needed is None or number + 1 in needed:
            values[number + 1] = run_step(step, weights.get(number), *(values[of] for of in step.reads))
    return values


def needs(steps: Sequence[Step], wanted: int) -> set[int]:
    """The values that one is computed from, itself included."""
    needed, front = {wanted}, [wanted]
    while front:
        value = front.pop()
        above = set(steps[value - 1].reads) - needed if value else set()
        needed |= above
        front.extend(above)
    return needed


def needed_steps(
    steps: Sequence[Step], weights: Mapping[int, Weights], wanted: int
) -> tuple[tuple[Step, ...], dict[int, Weights]]:
    """The steps that a value is computed from, and their weights, numbered anew: the value comes last."""
    needed = sorted(needs(steps, wanted) | {0})
    number_of = {value: number for number, value in enumerate(needed)}
    kept: list[Step] = []
    own: dict[int, Weights] = {}
    for value in needed[1:]:
        step = steps[value - 1]
        if value - 1 in weights:
            own[len(kept)] = weights[value - 1]
        kept.append(step.reading([number_of[of] for of in step.reads]))
    return tuple(kept), own
