"""What each node of a convolutional region is as a step: operators by what they are, constants by their values.

B batch, C channels, O output channels, I input channels
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal

import torch
from torch import fx

from thesean.passes.analyse.channel_operators import ELEMENTWISE, OPERATORS, Given, ReadStep, Unread, given_to, sizes_of
from thesean.passes.analyse.channel_steps import ReadSteps, reordered
from thesean.targets.shared.channel_groups import ChannelFacts, Map
from thesean.targets.shared.channels import (
    Activate,
    Concatenate,
    Convolution,
    GroupNorm,
    Join,
    Lay,
    Norm,
    Pad,
    Pick,
    Scale,
    Step,
    Weights,
    needed_steps,
    run_all,
)

_NOTHING = {
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "alias", "detach", "lift_fresh_copy",
}  # fmt: skip
# with other dimensions or without them: a map of one place, or one whose places are laid out anew
_RESHAPED = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"}
_JOINING: dict[str, Literal["sum", "product", "maximum"]] = {
    "add": "sum", "mul": "product", "maximum": "maximum", "max": "maximum",
}  # fmt: skip
_ARITHMETIC = {*_JOINING, "sub", "div"}
_DIVIDING = {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"}
# What an end of a slice is called where there is none.
_NO_END = 2**62


class ChannelReader:
    """Steps and weights as they are read, and by node the number of its value. `turned` are nodes that hold it channels
    last, `divided` those that hold it in pieces, with how many channels are in each, `passed` those that were read
    together with one before them.
    """

    def __init__(self, entry: fx.Node, values: Mapping[fx.Node, Any], channels_last: bool) -> None:
        self.values, self.numbers = values, {entry: 0}
        self.entry, self.channels_last = entry, channels_last
        self.turned: set[fx.Node] = {entry} if channels_last else set()
        self.divided: dict[fx.Node, list[int]] = {}
        self.passed: set[fx.Node] = set()
        self.made = ReadSteps(values[entry].ndim - 2)

    def read(self, node: fx.Node) -> None:
        """Raises Unread."""
        if isinstance(self.values[node], int) or node in self.passed:
            return  # a size, or read with what it leads to
        if node.target is operator.getitem:
            self._take(node)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise Unread("is no operator")
        given = given_to(node)
        name = node.target._opname.removesuffix("_")
        first = next(iter(given.values()), None)
        turned = any(i in self.turned for i in node.all_input_nodes)
        if name in _NOTHING:
            self.numbers[node] = self._of(first)
        elif name in ("permute", "transpose"):
            self.numbers[node] = self._of(first)
            turned = self._turns(first, given, turned)
        elif not turned and (found := reordered(node, self.values)):
            chain, places = found
            self.passed |= set(chain)
            self.numbers[chain[-1]] = self.made.add(Pick(of=self._of(first), places=places))
            return
        elif name in _RESHAPED:
            self.numbers[node] = self._reshaped(first, node, name)
        elif name == "linear":
            self.numbers[node] = self.made.add(*self._linear(given, turned))
        elif name == "layer_norm":
            self.numbers[node] = self.made.add(*self._layer_norm(given, turned))
        elif name in ("group_norm", "instance_norm") and not turned:
            self.numbers[node] = self.made.add(*self._group_norm(given))
        elif name == "cat":
            self.numbers[node] = self.made.add(self._concatenate(node, given))
        elif name in _DIVIDING:
            self.numbers[node] = self._of(first)
            self.divided[node] = self._divide(node, first, given)
        elif name == "glu":
            self.numbers[node] = self._gated(given)
        elif name == "slice" and self._along_channels(first, given):
            self.numbers[node] = self._slice_channels(first, given)
        elif turned and name not in ELEMENTWISE and name not in _ARITHMETIC:
            raise Unread("reads channels last")
        elif name == "slice":
            self.numbers[node] = self.made.add(self._slice(first, given))
        elif name.startswith("conv"):
            self.numbers[node] = self._convolution(name, given)
        elif name == "batch_norm":
            self.numbers[node] = self._norm(given)
        elif name in _ARITHMETIC and "other" in given:  # max has forms over a dimension
            self.numbers[node] = self.made.add(*self._arithmetic(name, node, given))
        elif name in OPERATORS:
            given["weight"] = self._constant(given.get("weight"))
            self.numbers[node] = self.made.add(*OPERATORS[name](name, self._of(first), given, self._dims(first)))
        else:
            raise Unread("is not among what can be read")
        if turned:
            self.turned.add(node)

    def facts(self, end: fx.Node) -> tuple[ChannelFacts, torch.Tensor]:
        """Of the steps that `end` needs, and the value there."""
        x = self.values[self.entry]
        x = x.movedim(-1, 1) if self.channels_last else x
        steps, weights = needed_steps(self.made.steps, self.made.weights, self.numbers[end])
        found = run_all(steps, {n: w.to(x.dtype) for n, w in weights.items()}, x)  # what the probe computes in
        maps = tuple(Map(int(v.shape[1]), math.prod(v.shape[2:])) for v in found.values())
        facts = ChannelFacts(steps=steps, weights=weights, maps=maps, channels_last=self.channels_last)
        y = found[len(steps)]
        return facts, y.movedim(1, -1) if self.channels_last else y

    def _dims(self, node: Any) -> int:
        return self.made.dims[self._of(node)]

    def _axis(self, node: fx.Node) -> int:
        """The dimension that a node's channels are in."""
        return int(self.values[node].ndim) - 1 if node in self.turned else 1

    def _along_channels(self, node: Any, given: Given) -> bool:
        return node in self.numbers and int(given["dim"]) % self.values[node].ndim == self._axis(node)

    def _of(self, value: Any) -> int:
        if not isinstance(value, fx.Node) or value not in self.numbers:
            raise Unread("reads what is no map of the part")
        return self.numbers[value]

    def _constant(self, value: Any) -> torch.Tensor | None:
        if value is None:
            return None
        if isinstance(value, fx.Node):
            if value in self.numbers:
                raise Unread("reads weights that are computed")
            value = self.values[value]
        found = torch.as_tensor(value)
        if found.is_complex() or not bool(torch.isfinite(found.float()).all()):
            raise Unread("reads a number that is not finite")
        return found.detach()

    def _count(self, value: Any, given: Given) -> int:
        """How many channels an operator divides. Raises Unread where it divides places."""
        if not self._along_channels(value, given):
            raise Unread("of places, and no channels")
        return int(self.values[value].shape[self._axis(value)])

    def _divide(self, node: fx.Node, of: Any, given: Given) -> list[int]:
        """How many channels are in each piece."""
        self._count(of, given)
        return [int(piece.shape[self._axis(of)]) for piece in self.values[node]]

    def _take(self, node: fx.Node) -> None:
        """One piece of several."""
        of, at = node.args
        if not isinstance(of, fx.Node) or of not in self.divided or not isinstance(at, int):
            raise Unread("reads what is no map of the part")
        counts = self.divided[of]
        at %= len(counts)
        self.numbers[node] = self.made.some_of(self._of(of), sum(counts[:at]), counts[at])
        if of in self.turned:
            self.turned.add(node)

    def _gated(self, given: Given) -> int:
        """One half of the channels, by the sigmoid of the other."""
        half = self._count(given["self"], given) // 2
        first, second = (self.made.some_of(self._of(given["self"]), start, half) for start in (0, half))
        gate = self.made.add(Activate(of=second, name="sigmoid"))
        return self.made.add(Join(of=first, other=gate, form="product"))

    def _slice_channels(self, node: Any, given: Given) -> int:
        """Channels in a row."""
        if given["step"] != 1 or not all(isinstance(given[n], (int, NoneType)) for n in ("start", "end")):
            raise Unread("is not among what can be read")
        start, end, _ = slice(given["start"], given["end"]).indices(self._count(node, given))
        return self.made.some_of(self._of(node), start, end - start)

    def _turns(self, node: Any, given: Given, turned: bool) -> bool:
        """Whether channels come last after an order of dimensions. Raises Unread for any other."""
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
        raise Unread("lays out a map in another way")

    def _reshaped(self, node: Any, after: fx.Node, name: str) -> int:
        """A map of one place may lose its other dimensions, get them back, and be the same at each of several; the
        places of any other may be laid out anew.
        """
        of, old, new = self._of(node), self.values[node].shape, self.values[after].shape
        copied = name in ("expand", "expand_as")
        if old[:2] != new[:2] or node in self.turned:
            raise Unread("is not among what can be read")
        if math.prod(old[2:]) == 1 and (copied or math.prod(new[2:]) == 1):
            return of
        size = tuple(after.meta["val"].shape[2:]) if len(new) > 3 else ()
        if copied or len(new) < 3 or not all(isinstance(n, int) for n in size):
            raise Unread("is not among what can be read")
        return self.made.add(Lay(of=of, size=size))

    def _slice(self, node: Any, given: Given) -> Pad:
        """As borders that are cropped."""
        of, value, meta = self._of(node), self.values[node], node.meta["val"]
        dim, start, end = int(given["dim"]) % value.ndim, given["start"] or 0, given["end"]
        end = _NO_END if end is None else end
        numbers = all(isinstance(n, int) for n in (start, end, given["step"]))
        if not numbers or dim < 2 or given["step"] != 1 or start < 0:
            raise Unread("is not among what can be read")
        if 0 <= end < _NO_END:
            if not isinstance(meta.shape[dim], int):
                raise Unread("at a place that is counted from the start of a length that varies")
            end = min(0, end - value.shape[dim])
        sizes = [0] * (2 * self.made.dims[of])
        at = 2 * (value.ndim - 1 - dim)
        sizes[at : at + 2] = -start, 0 if end >= _NO_END else end
        return Pad(of=of, sizes=tuple(sizes))

    def _convolution(self, name: str, given: Given) -> int:
        of, weight, bias = self._of(given["input"]), self._constant(given["weight"]), self._constant(given["bias"])
        assert weight is not None
        dims, groups, padding = weight.ndim - 2, int(given["groups"]), given["padding"]
        if dims != self.made.dims[of]:
            raise Unread("reads another kind of map")
        stride, dilation = (sizes_of(given[key], dims) for key in ("stride", "dilation"))
        transposed = "transpose" in name or bool(given.get("transposed"))
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(weight.shape[2:], dilation, strict=True)]
            uneven = any(t % 2 for t in total)
            if uneven:
                of = self.made.add(Pad(of=of, sizes=tuple(p for t in reversed(total) for p in (t // 2, t - t // 2))))
            padding = [0 if uneven else t // 2 for t in total]
        rows, columns = weight.shape[0], weight.shape[1] * groups
        into, out = (rows, columns) if transposed else (columns, rows)
        step = Convolution(
            of=of, channels_in=into, channels_out=out, kernel=tuple(weight.shape[2:]), stride=stride,
            padding=sizes_of(padding, dims), dilation=dilation, groups=groups, transposed=transposed,
            output_padding=sizes_of(given["output_padding"], dims) if transposed else (),
        )  # fmt: skip
        return self.made.add(step, Weights(weight, weight.new_zeros(out) if bias is None else bias))

    def _linear(self, given: Given, turned: bool) -> ReadStep:
        """One of each place's channels: a convolution of one tap."""
        if not turned and self.values[given["input"]].ndim != 2:
            raise Unread("reads places, and no channels")
        of, weight_OI, bias_O = self._of(given["input"]), self._constant(given["weight"]), self._constant(given["bias"])
        assert weight_OI is not None
        ones = (1,) * self.made.dims[of]
        step = Convolution(
            of=of, channels_in=weight_OI.shape[1], channels_out=weight_OI.shape[0], kernel=ones, stride=ones,
            padding=(0,) * len(ones), dilation=ones,
        )  # fmt: skip
        bias_O = weight_OI.new_zeros(len(weight_OI)) if bias_O is None else bias_O
        return step, Weights(weight_OI.reshape(*weight_OI.shape, *ones), bias_O)

    def _layer_norm(self, given: Given, turned: bool) -> ReadStep:
        vectors = self.values[given["input"]].ndim == 2
        if not (turned or vectors) or len(given["normalized_shape"]) != 1:
            raise Unread("norms places, and no channels")
        (channels,) = given["normalized_shape"]
        weights = self._numbers(given, channels)
        return Norm(of=self._of(given["input"]), channels=channels, eps=float(given["eps"])), weights

    def _group_norm(self, given: Given) -> ReadStep:
        """An instance norm is one of as many groups as channels."""
        channels = self.values[given["input"]].shape[1]
        if not given.get("use_input_stats", True):
            raise Unread("norms by running statistics")
        step = GroupNorm(
            of=self._of(given["input"]), channels=channels, groups=int(given.get("num_groups", channels)),
            eps=float(given["eps"]),
        )  # fmt: skip
        return step, self._numbers(given, channels)

    def _numbers(self, given: Given, channels: int) -> Weights:
        """A norm's weight and bias, or what stands for none."""
        weight_C, bias_C = self._constant(given["weight"]), self._constant(given["bias"])
        like = self.values[given["input"]]
        return Weights(
            like.new_ones(channels) if weight_C is None else weight_C,
            like.new_zeros(channels) if bias_C is None else bias_C,
        )

    def _concatenate(self, node: fx.Node, given: Given) -> Step:
        of, *others = (self._of(value) for value in given["tensors"])
        if not all(self._along_channels(value, given) for value in given["tensors"]):
            raise Unread("of places, and no channels")
        return Concatenate(of=of, others=tuple(others))

    def _norm(self, given: Given) -> int:
        """By running statistics: of a convolution that nothing else reads, its own weights, scaled."""
        of = self._of(given["input"])
        mean_C, variance_C = (self._constant(given[name]) for name in ("running_mean", "running_var"))
        if given["training"] or mean_C is None or variance_C is None:
            raise Unread("norms by the batch's own statistics")
        weight_C, bias_C = (self._constant(given[name]) for name in ("weight", "bias"))
        scale_C = (variance_C.double() + given["eps"]).rsqrt()
        scale_C = scale_C if weight_C is None else scale_C * weight_C.double()
        shift_C = -mean_C.double() * scale_C
        shift_C = shift_C if bias_C is None else shift_C + bias_C.double()
        before = self.made.steps[of - 1] if of else None
        alone = len(given["input"].users) == 1
        if isinstance(before, Convolution) and not before.transposed and alone:
            weight, bias = self.made.weights[of - 1]
            assert bias is not None
            by_row = scale_C.view(-1, *[1] * (weight.ndim - 1))
            folded = Weights((weight.double() * by_row).to(weight), (bias.double() * scale_C + shift_C).to(bias))
            self.made.weights[of - 1] = folded
            return of
        scaled = Weights(scale_C.to(mean_C.dtype), shift_C.to(mean_C.dtype))
        return self.made.add(Scale(of=of, channels=len(scale_C)), scaled)

    def _arithmetic(self, name: str, node: fx.Node, given: Given) -> ReadStep:
        """Two maps joined; or one and a constant, a number for all or for each channel."""
        first, second = given["self"], given["other"]
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            raise Unread("is scaled")
        ours = [isinstance(v, fx.Node) and v in self.numbers for v in (first, second)]
        if all(ours):
            if name not in _JOINING:
                raise Unread("of two maps is not among what can be read")
            if (first in self.turned) != (second in self.turned):
                raise Unread("of two maps that are laid out in two ways")
            return Join(of=self.numbers[first], other=self.numbers[second], form=_JOINING[name]), None
        if name in ("sub", "div") and not ours[0]:
            raise Unread("from a constant is not among what can be read")
        of, constant = (first, second) if ours[0] else (second, first)
        number = self._constant(constant)
        shape = self.values[of].shape
        if number is None or shape != self.values[node].shape:
            raise Unread("of another shape than the map")
        padded = (*[1] * (len(shape) - number.ndim), *number.shape)
        axis = len(shape) - 1 if of in self.turned else 1
        if any(size != 1 for at, size in enumerate(padded) if at != axis):
            raise Unread("by a number for each place is not among what can be read")
        number_C = number.reshape(-1).to(self.values[of].dtype).expand(shape[axis])
        ones_C, zeros_C = torch.ones_like(number_C), torch.zeros_like(number_C)
        by_name = {
            "add": (ones_C, number_C), "sub": (ones_C, -number_C), "mul": (number_C, zeros_C),
            "div": (1 / number_C, zeros_C),
        }  # fmt: skip
        weight_C, bias_C = by_name[name]
        return Scale(of=self.numbers[of], channels=shape[axis]), Weights(weight_C.clone(), bias_C.clone())
