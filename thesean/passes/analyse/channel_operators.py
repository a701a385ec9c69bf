"""Operators of one map, and numbers, as steps: what each is called, and what its arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import fx

from thesean.targets.shared.channels import Activate, Average, Pad, Pool, Resize, Slope, Step, Weights

ReadStep = tuple[Step, Weights | None]
Given = dict[str, Any]  # an operator's arguments by name

_BY_NAME = {
    "relu": "relu", "relu6": "relu6", "silu": "silu", "mish": "mish", "hardswish": "hardswish", "selu": "selu",
    "hardsigmoid": "hardsigmoid", "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip


class Unread(Exception):
    """An operator that is none of the steps."""


def given_to(node: fx.Node) -> Given:
    """An operator's arguments by name, with its defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given |= dict(zip([a.name for a in schema], node.args, strict=False)) | node.kwargs
    return {a.name: given[a.name] for a in schema if a.name in given}


def sizes_of(told: Any, dims: int) -> tuple[int, ...]:
    sizes = list(told) if isinstance(told, (list, tuple)) else [told]
    if not all(isinstance(size, int) for size in sizes):
        raise Unread("has a size that is computed")
    return tuple((sizes * dims if len(sizes) == 1 else sizes)[:dims])


def _named(name: str, of: int, given: Given, dims: int) -> ReadStep:
    return Activate(of=of, name=_BY_NAME[name]), None


def _gelu(name: str, of: int, given: Given, dims: int) -> ReadStep:
    return Activate(of=of, name="gelu_tanh" if given["approximate"] == "tanh" else "gelu"), None


def _leaky(name: str, of: int, given: Given, dims: int) -> ReadStep:
    return Activate(of=of, name="leaky_relu", slope=float(given["negative_slope"])), None


def _elu(name: str, of: int, given: Given, dims: int) -> ReadStep:
    if any(given[n] != 1 for n in ("alpha", "scale", "input_scale")):
        raise Unread("has an alpha of its own")
    return Activate(of=of, name="elu"), None


def _softplus(name: str, of: int, given: Given, dims: int) -> ReadStep:
    if (given["beta"], given["threshold"]) != (1, 20):
        raise Unread("has a beta of its own")
    return Activate(of=of, name="softplus"), None


def _clamp(name: str, of: int, given: Given, dims: int) -> ReadStep:
    low, high = (given.get(a, given.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        raise Unread("has bounds that are computed")
    low, high = (None if bound is None else float(bound) for bound in (low, high))
    if (low, high) == (0, 6):
        return Activate(of=of, name="relu6"), None
    return Activate(of=of, name="relu") if (low, high) == (0, None) else Activate(
        of=of, name="clamp", low=low, high=high
    ), None  # fmt: skip


def _slope(name: str, of: int, given: Given, dims: int) -> ReadStep:
    weight = given["weight"]
    assert weight is not None
    return Slope(of=of, channels=weight.numel()), Weights(weight.reshape(-1))


def _pool(name: str, of: int, given: Given, dims: int) -> ReadStep:
    kernel = sizes_of(given["kernel_size"], dims)
    stride = sizes_of(given["stride"], dims) if given["stride"] else kernel
    if name.startswith("max"):
        return Pool(
            of=of, form="max", kernel=kernel, stride=stride, padding=sizes_of(given["padding"], dims),
            dilation=sizes_of(given["dilation"], dims), ceil=bool(given["ceil_mode"]),
        ), None  # fmt: skip
    if given.get("divisor_override") is not None:
        raise Unread("divides by a number of its own")
    return Pool(
        of=of, form="average", kernel=kernel, stride=stride, padding=sizes_of(given["padding"], dims),
        ceil=bool(given["ceil_mode"]), counts_padding=bool(given["count_include_pad"]),
    ), None  # fmt: skip


def _average(name: str, of: int, given: Given, dims: int) -> ReadStep:
    if name == "mean":
        wanted = {int(d) % (dims + 2) for d in given["dim"] or ()}
        if wanted != set(range(2, dims + 2)):
            raise Unread("of other dimensions than the map's")
        return Average(of=of, size=(1,) * dims), None
    return Average(of=of, size=sizes_of(given["output_size"], dims)), None


def _resize(name: str, of: int, given: Given, dims: int) -> ReadStep:
    times = given.get("scale_factors")
    if not times or not all(isinstance(t, (int, float)) for t in times):
        raise Unread("to a size that is given, and not by a factor,")
    form: Literal["nearest", "linear"] = "nearest" if "nearest" in name else "linear"
    return Resize(of=of, times=tuple(map(float, times)), form=form, corners=bool(given.get("align_corners"))), None


def _pad(name: str, of: int, given: Given, dims: int) -> ReadStep:
    modes: dict[str, Literal["constant", "reflect", "replicate"]] = {
        "reflection": "reflect", "replication": "replicate",
    }  # fmt: skip
    mode = modes.get(name.split("_")[0]) or given.get("mode", "constant")
    sizes = list(given["padding"] if "padding" in given else given["pad"])
    if mode == "constant" and given.get("value") not in (None, 0):
        raise Unread("pads with something else than zeros")
    if not all(isinstance(size, int) for size in sizes) or len(sizes) > 2 * dims:
        raise Unread("pads channels, or by sizes that are computed")
    return Pad(of=of, sizes=tuple(sizes), mode=mode), None


_Read = Callable[[str, int, Given, int], ReadStep]

# of each number by itself, wherever channels lie
ELEMENTWISE: dict[str, _Read] = {
    **dict.fromkeys(_BY_NAME, _named),
    "gelu": _gelu, "leaky_relu": _leaky, "elu": _elu, "softplus": _softplus,
    **dict.fromkeys(("hardtanh", "clamp", "clamp_min", "clamp_max"), _clamp),
}  # fmt: skip

OPERATORS: dict[str, _Read] = {
    **ELEMENTWISE, "prelu": _slope, "_prelu_kernel": _slope,
    **{f"{form}_pool{dims}d": _pool for form in ("max", "avg") for dims in (1, 2, 3)},
    **{f"upsample_{form}{dims}d": _resize
       for form, dims in (("nearest", 1), ("nearest", 2), ("nearest", 3), ("linear", 1), ("bilinear", 2),
                          ("trilinear", 3))},
    **{f"adaptive_avg_pool{dims}d": _average for dims in (1, 2, 3)}, "mean": _average,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **{f"{form}_pad{dims}d": _pad for form in ("reflection", "replication") for dims in (1, 2, 3)},
}  # fmt: skip
