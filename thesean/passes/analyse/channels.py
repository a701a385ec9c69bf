"""Read a convolutional region off its graph: which steps keep channels apart, which mix them, and with what weights.

Operators are read by what they are, constants by their values, and norms by running statistics become a scale and a
shift, folded into the convolution before them. What was read must reproduce the recorded output.

B batch, C channels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.regions import Region
from thesean.targets.shared.channels import (
    Activate,
    Average,
    ChannelFacts,
    Concatenate,
    Convolution,
    Join,
    Map,
    Norm,
    Pad,
    Pool,
    Scale,
    Slope,
    Step,
    Weights,
    run_step,
)

# Of the output's largest value.
_EXACT = 1e-4

_BY_NAME = {
    "relu": "relu", "relu6": "relu6", "silu": "silu", "mish": "mish", "hardswish": "hardswish", "selu": "selu",
    "hardsigmoid": "hardsigmoid", "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip
_NOTHING = {
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "alias", "detach", "lift_fresh_copy",
    "detach_",
}  # fmt: skip

_ELEMENTWISE = {
    *_BY_NAME, "gelu", "leaky_relu", "elu", "softplus", "hardtanh", "clamp", "clamp_min", "clamp_max", "add", "mul",
    "sub", "div",
}  # fmt: skip

_Read = tuple[Step, Weights | None]


class _Unread(Exception):
    """An operator that is none of the steps."""


@torch.no_grad()
def find_channels(region: Region, values: Mapping[fx.Node, Any]) -> tuple[ChannelFacts | None, str]:
    """The region's steps; or None, and what of it can't be read."""
    x = values[region.entry]
    if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4, 5) or not x.is_floating_point():
        return None, "it reads no feature map"
    reader = _Reader(region.entry, values)
    for node in region.nodes:
        try:
            reader.read(node)
        except _Unread as unread:
            return None, f"{str(node.target).removeprefix('aten.')} {unread}".strip()
    facts, y = reader.facts(x, region.exit)
    wanted = values[region.exit]
    if y.shape != wanted.shape or (y - wanted).abs().max() > _EXACT * wanted.abs().max():
        return None, "what was read of it gives something else"
    return facts, ""


class _Reader:
    """Steps and weights as they are read, and by node the number of its value. `turned` are nodes that hold it channels
    last.
    """

    def __init__(self, entry: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        self.values, self.numbers = values, {entry: 0}
        self.turned: set[fx.Node] = set()
        self.steps: list[Step] = []
        self.weights: dict[int, Weights] = {}

    def read(self, node: fx.Node) -> None:
        """Raises _Unread."""
        if not isinstance(node.target, torch._ops.OpOverload):
            raise _Unread("is no operator")
        given = self._given(node)
        name = node.target._opname.removesuffix("_")
        first = next(iter(given.values()), None)
        turned = any(i in self.turned for i in node.all_input_nodes)
        if name in _NOTHING or name in ("permute", "transpose"):
            self.numbers[node] = self._of(first)
            turned = turned if name in _NOTHING else self._turns(first, given, turned)
        elif name == "linear":
            self.numbers[node] = self._add(*self._linear(given, turned))
        elif name == "layer_norm":
            self.numbers[node] = self._add(*self._layer_norm(given, turned))
        elif name == "cat":
            self.numbers[node] = self._add(self._concatenate(node, given))
        elif turned and name not in _ELEMENTWISE:
            raise _Unread("reads channels last")
        else:
            self._read_first(name, node, given)
        if turned:
            self.turned.add(node)

    def _read_first(self, name: str, node: fx.Node, given: dict[str, Any]) -> None:
        if name.startswith("conv") and "transpose" not in name:
            pads, *read = self._convolution(given)
            if pads is not None:
                self._add(pads)
                read[0] = (read[0][0].model_copy(update={"of": len(self.steps)}), read[0][1])
            self.numbers[node] = self._add(*read[0])
        elif name in ("add", "mul", "sub", "div"):
            self.numbers[node] = self._add(*self._arithmetic(name, node, given))
        elif name == "batch_norm":
            self.numbers[node] = self._norm(node, given)
        else:
            reading = _SINGLE.get(name)
            if reading is None:
                raise _Unread("is not among what can be read")
            of = self._of(given[next(iter(given))])
            self.numbers[node] = self._add(*reading(self, name, of, given, self._dims(node)))

    def facts(self, x: torch.Tensor, end: fx.Node) -> tuple[ChannelFacts, torch.Tensor]:
        """Of the steps up to `end`, and the value there."""
        last = self.numbers[end]
        weights = {n: w for n, w in self.weights.items() if n < last}
        found = [x]
        for number, step in enumerate(self.steps[:last]):
            held = weights.get(number)
            wide = None if held is None else held.to(x.dtype)  # what the probe computes in
            found.append(run_step(step, wide, *(found[of] for of in step.reads)))
        maps = tuple(Map(int(v.shape[1]), math.prod(v.shape[2:])) for v in found)
        return ChannelFacts(steps=tuple(self.steps[:last]), weights=weights, maps=maps), found[last]

    def _given(self, node: fx.Node) -> dict[str, Any]:
        """The operator's arguments by name, with its defaults."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip([a.name for a in schema], node.args, strict=False)) | node.kwargs
        return {a.name: given[a.name] for a in schema if a.name in given}

    def _of(self, value: Any) -> int:
        if not isinstance(value, fx.Node) or value not in self.numbers:
            raise _Unread("reads what is no map of the part")
        return self.numbers[value]

    def _constant(self, value: Any) -> torch.Tensor | None:
        if value is None:
            return None
        if isinstance(value, fx.Node):
            if value in self.numbers:
                raise _Unread("reads weights that are computed")
            value = self.values[value]
        found = torch.as_tensor(value)
        if found.is_complex() or not bool(torch.isfinite(found.float()).all()):
            raise _Unread("reads a number that is not finite")
        return found.detach()

    def _dims(self, node: fx.Node) -> int:
        value = self.values[node]
        if not isinstance(value, torch.Tensor) or value.ndim not in (3, 4, 5):
            raise _Unread("gives no feature map")
        return value.ndim - 2

    def _add(self, step: Step, weights: Weights | None = None) -> int:
        if weights is not None:
            self.weights[len(self.steps)] = weights
        self.steps.append(step)
        return len(self.steps)

    def _convolution(self, given: dict[str, Any]) -> tuple[Pad | None, _Read]:
        if any(given.get(name) for name in ("transposed",)):
            raise _Unread("is transposed")
        of, weight, bias = self._of(given["input"]), self._constant(given["weight"]), self._constant(given["bias"])
        assert weight is not None
        dims = weight.ndim - 2
        if dims not in (1, 2, 3):
            raise _Unread("has no kernel")
        stride, dilation = (_sizes(given[name], dims) for name in ("stride", "dilation"))
        groups, pads, padding = int(given["groups"]), None, given["padding"]
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(weight.shape[2:], dilation, strict=True)]
            uneven = any(t % 2 for t in total)
            if uneven:
                pads = Pad(of=of, sizes=tuple(p for t in reversed(total) for p in (t // 2, t - t // 2)))
            padding = [0 if uneven else t // 2 for t in total]
        step = Convolution(
            of=of, channels_in=weight.shape[1] * groups, channels_out=weight.shape[0], kernel=tuple(weight.shape[2:]),
            stride=stride, padding=_sizes(padding, dims), dilation=dilation, groups=groups,
        )  # fmt: skip
        return pads, (step, Weights(weight, weight.new_zeros(len(weight)) if bias is None else bias))

    def _turns(self, node: Any, given: dict[str, Any], turned: bool) -> bool:
        """Whether channels come last after an order of dimensions. Raises _Unread for any other."""
        rank = self.values[node].ndim
        order = list(range(rank))
        if "dims" in given:
            order = [int(d) % rank for d in given["dims"]]
        else:
            a, b = (int(given[name]) % rank for name in ("dim0", "dim1"))
            order[a], order[b] = order[b], order[a]
        if not turned and order == [0, *range(2, rank), 1]:
            return True
        if turned and order == [0, rank - 1, *range(1, rank - 1)]:
            return False
        raise _Unread("lays out a map in another way")

    def _linear(self, given: dict[str, Any], turned: bool) -> _Read:
        """One of each place's channels: a convolution of one tap."""
        if not turned:
            raise _Unread("reads places, and no channels")
        of, weight_OI, bias_O = self._of(given["input"]), self._constant(given["weight"]), self._constant(given["bias"])
        assert weight_OI is not None
        dims = self.values[given["input"]].ndim - 2
        ones = (1,) * dims
        step = Convolution(
            of=of, channels_in=weight_OI.shape[1], channels_out=weight_OI.shape[0], kernel=ones, stride=ones,
            padding=(0,) * dims, dilation=ones,
        )  # fmt: skip
        bias_O = weight_OI.new_zeros(len(weight_OI)) if bias_O is None else bias_O
        return step, Weights(weight_OI.view(*weight_OI.shape, *ones), bias_O)

    def _layer_norm(self, given: dict[str, Any], turned: bool) -> _Read:
        if not turned or len(given["normalized_shape"]) != 1:
            raise _Unread("norms places, and no channels")
        weight_C, bias_C = self._constant(given["weight"]), self._constant(given["bias"])
        (channels,) = given["normalized_shape"]
        like = self.values[given["input"]]
        weights = Weights(
            like.new_ones(channels) if weight_C is None else weight_C,
            like.new_zeros(channels) if bias_C is None else bias_C,
        )
        return Norm(of=self._of(given["input"]), channels=channels, eps=float(given["eps"])), weights

    def _concatenate(self, node: fx.Node, given: dict[str, Any]) -> Step:
        of, *others = (self._of(value) for value in given["tensors"])
        if int(given["dim"]) % self.values[node].ndim != 1 or any(v in self.turned for v in given["tensors"]):
            raise _Unread("of places, and no channels")
        return Concatenate(of=of, others=tuple(others))

    def _norm(self, node: fx.Node, given: dict[str, Any]) -> int:
        """By running statistics: of a convolution that nothing else reads, its own weights, scaled."""
        of = self._of(given["input"])
        mean_C, variance_C = (self._constant(given[name]) for name in ("running_mean", "running_var"))
        if given["training"] or mean_C is None or variance_C is None:
            raise _Unread("norms by the batch's own statistics")
        weight_C, bias_C = (self._constant(given[name]) for name in ("weight", "bias"))
        scale_C = (variance_C.double() + given["eps"]).rsqrt()
        scale_C = scale_C if weight_C is None else scale_C * weight_C.double()
        shift_C = -mean_C.double() * scale_C
        shift_C = shift_C if bias_C is None else shift_C + bias_C.double()
        before = self.steps[of - 1] if of else None
        if isinstance(before, Convolution) and len(given["input"].users) == 1:
            weight, bias = self.weights[of - 1]
            assert bias is not None
            by_row = scale_C.view(-1, *[1] * (weight.ndim - 1))
            folded = Weights((weight.double() * by_row).to(weight), (bias.double() * scale_C + shift_C).to(bias))
            self.weights[of - 1] = folded
            return of
        return self._add(
            Scale(of=of, channels=len(scale_C)), Weights(scale_C.to(mean_C.dtype), shift_C.to(mean_C.dtype))
        )

    def _arithmetic(self, name: str, node: fx.Node, given: dict[str, Any]) -> _Read:
        """Two maps joined; or one and a constant, a number for all or for each channel."""
        first, second = given["self"], given["other"]
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            raise _Unread("is scaled")
        ours = [isinstance(v, fx.Node) and v in self.numbers for v in (first, second)]
        if all(ours):
            if name not in ("add", "mul"):
                raise _Unread("of two maps is not among what can be read")
            if (first in self.turned) != (second in self.turned):
                raise _Unread("of two maps that are laid out in two ways")
            a, b = self.numbers[first], self.numbers[second]
            return Join(of=a, other=b, form="sum" if name == "add" else "product"), None
        if name in ("sub", "div") and not ours[0]:
            raise _Unread("from a constant is not among what can be read")
        of, constant = (first, second) if ours[0] else (second, first)
        number = self._constant(constant)
        shape = self.values[of].shape
        if number is None or shape != self.values[node].shape:
            raise _Unread("of another shape than the map")
        padded = (*[1] * (len(shape) - number.ndim), *number.shape)
        axis = len(shape) - 1 if of in self.turned else 1
        if any(size != 1 for at, size in enumerate(padded) if at != axis):
            raise _Unread("by a number for each place is not among what can be read")
        number_C = number.reshape(-1).to(self.values[of].dtype).expand(shape[axis])
        ones_C, zeros_C = torch.ones_like(number_C), torch.zeros_like(number_C)
        by_name = {
            "add": (ones_C, number_C), "sub": (ones_C, -number_C), "mul": (number_C, zeros_C),
            "div": (1 / number_C, zeros_C),
        }  # fmt: skip
        weight_C, bias_C = by_name[name]
        return Scale(of=self.numbers[of], channels=shape[axis]), Weights(weight_C.clone(), bias_C.clone())


def _sizes(told: Any, dims: int) -> tuple[int, ...]:
    sizes = list(told) if isinstance(told, (list, tuple)) else [told]
    if not all(isinstance(size, int) for size in sizes):
        raise _Unread("has a size that is computed")
    return tuple((sizes * dims if len(sizes) == 1 else sizes)[:dims])


def _named(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    return Activate(of=of, name=_BY_NAME[name]), None


def _gelu(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    return Activate(of=of, name="gelu_tanh" if given["approximate"] == "tanh" else "gelu"), None


def _leaky(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    return Activate(of=of, name="leaky_relu", slope=float(given["negative_slope"])), None


def _elu(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    if any(given[n] != 1 for n in ("alpha", "scale", "input_scale")):
        raise _Unread("has an alpha of its own")
    return Activate(of=of, name="elu"), None


def _softplus(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    if (given["beta"], given["threshold"]) != (1, 20):
        raise _Unread("has a beta of its own")
    return Activate(of=of, name="softplus"), None


def _clamp(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    low, high = (given.get(a, given.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        raise _Unread("has bounds that are computed")
    low, high = (None if bound is None else float(bound) for bound in (low, high))
    if (low, high) == (0, 6):
        return Activate(of=of, name="relu6"), None
    return Activate(of=of, name="relu") if (low, high) == (0, None) else Activate(
        of=of, name="clamp", low=low, high=high
    ), None  # fmt: skip


def _slope(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    weight = reader._constant(given["weight"])
    assert weight is not None
    return Slope(of=of, channels=weight.numel()), Weights(weight.reshape(-1))


def _pool(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    kernel = _sizes(given["kernel_size"], dims)
    stride = _sizes(given["stride"], dims) if given["stride"] else kernel
    if name.startswith("max"):
        return Pool(
            of=of, form="max", kernel=kernel, stride=stride, padding=_sizes(given["padding"], dims),
            dilation=_sizes(given["dilation"], dims), ceil=bool(given["ceil_mode"]),
        ), None  # fmt: skip
    if given.get("divisor_override") is not None:
        raise _Unread("divides by a number of its own")
    return Pool(
        of=of, form="average", kernel=kernel, stride=stride, padding=_sizes(given["padding"], dims),
        ceil=bool(given["ceil_mode"]), counts_padding=bool(given["count_include_pad"]),
    ), None  # fmt: skip


def _average(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    if name == "mean":
        wanted = {int(d) % (dims + 2) for d in given["dim"] or ()}
        if not given["keepdim"] or wanted != set(range(2, dims + 2)):
            raise _Unread("of other dimensions than the map's")
        return Average(of=of, size=(1,) * dims), None
    return Average(of=of, size=_sizes(given["output_size"], dims)), None


def _pad(reader: _Reader, name: str, of: int, given: dict[str, Any], dims: int) -> _Read:
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        raise _Unread("pads with something else than zeros")
    sizes = list(given["pad"])
    if not all(isinstance(size, int) for size in sizes) or len(sizes) > 2 * dims:
        raise _Unread("pads channels, or by sizes that are computed")
    return Pad(of=of, sizes=tuple(sizes)), None


_SINGLE: dict[str, Callable[[_Reader, str, int, dict[str, Any], int], _Read]] = {
    **dict.fromkeys(_BY_NAME, _named),
    "gelu": _gelu, "leaky_relu": _leaky, "elu": _elu, "softplus": _softplus, "prelu": _slope, "_prelu_kernel": _slope,
    **dict.fromkeys(("hardtanh", "clamp", "clamp_min", "clamp_max"), _clamp),
    **{f"{form}_pool{dims}d": _pool for form in ("max", "avg") for dims in (1, 2, 3)},
    **{f"adaptive_avg_pool{dims}d": _average for dims in (1, 2, 3)}, "mean": _average,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}  # fmt: skip
