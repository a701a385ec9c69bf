"""Operators that torch's exporter writes wrongly, or not at all, become others that a file computes as torch does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from thesean.kernels.running_fold import log_of_sum
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.complex_pairs import pairs_form
from thesean.passes.graph.inline_calls import inline_calls
from thesean.passes.graph.trace_call import trace_call

aten = torch.ops.aten


def _log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """As log(sigmoid(x)) it is -16.2 at -17, since onnxruntime's sigmoid has an absolute error, and -inf at -104."""
    return -F.softplus(-x)


def _logaddexp2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return log_of_sum(a * math.log(2), b * math.log(2)) / math.log(2)


def _atan2(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """At y = 0 left of the origin it is pi, as torch has it, and not -pi."""
    angle = torch.atan(y / torch.where((x == 0) & (y == 0), 1.0, x))
    half_turn = torch.where(y < 0, -math.pi, math.pi)
    return torch.where(x < 0, angle + half_turn, angle)


def _other_of_nan(choose: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, choose(a, b)))


def _hypot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By the ratio: squares of large numbers are infinite."""
    long, short = torch.maximum(a.abs(), b.abs()), torch.minimum(a.abs(), b.abs())
    ratio = short / torch.where(long == 0, 1.0, long)
    return long * (1 + ratio * ratio).sqrt()


def _copysign(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b < 0, -a.abs(), a.abs())


def _median(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower one of two."""
    values, places = x.sort(dim)
    found = [t.narrow(dim, (x.shape[dim] - 1) // 2, 1) for t in (values, places)]
    values, places = found if keepdim else (t.squeeze(dim) for t in found)
    return values, places


def _cross_entropy(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    pos_weight: torch.Tensor | None = None,
    reduction: int = 1,
) -> torch.Tensor:
    """binary_cross_entropy_with_logits, which the exporter takes apart to log(sigmoid(x))."""
    own = F.softplus(-x)
    loss = (1 - target) * x + (own if pos_weight is None else (1 + (pos_weight - 1) * target) * own)
    loss = loss if weight is None else weight * loss
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def _adaptive_average(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Means of as many stretches along each of the last dimensions, which overlap where lengths aren't multiples."""
    for dim, count in zip(range(-len(sizes), 0), sizes, strict=True):
        length, bins_N = x.shape[dim], torch.arange(count, device=x.device)
        start_N1, end_N1 = (t.unsqueeze(1) for t in (bins_N * length // count, -((bins_N + 1) * -length // count)))
        place_L = torch.arange(length, device=x.device)
        share_NL = ((place_L >= start_N1) & (place_L < end_N1)).to(x.dtype) / (end_N1 - start_N1)
        x = (x.movedim(dim, -1) @ share_NL.mT).movedim(-1, dim)
    return x


_ADAPTIVE = {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default}


def _pools_what_is_free(node: fx.Node) -> bool:
    """To a number of places that torch's exporter makes a stride of, right for the sizes of the trace alone."""
    sizes = node.args[1] if node.target in _ADAPTIVE else None
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(n, int) for n in sizes):
        return False
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    free = [isinstance(n, torch.SymInt) for n in value.shape[-len(sizes) :]]
    return any(free) and set(sizes) != {1}


FORMS: Mapping[Any, Callable[..., Any]] = {
    aten.log_sigmoid.default: _log_sigmoid,
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    aten.logaddexp.default: log_of_sum,
    aten.logaddexp2.default: _logaddexp2,
    aten.atan2.default: _atan2,
    aten.fmax.default: _other_of_nan(torch.maximum),
    aten.fmin.default: _other_of_nan(torch.minimum),
    aten.hypot.default: _hypot,
    aten.copysign.Tensor: _copysign,
    aten.median.dim: _median,
}


def form_of(node: fx.Node) -> Callable[..., Any] | None:
    """What is written in its place; None for an operator that stays as it is."""
    return _adaptive_average if _pools_what_is_free(node) else FORMS.get(node.target) or pairs_form(node)


@dataclass(frozen=True)
class WriteOutForOnnx(Pass):
    """y = op(x)  =>  y = the same of operators whose ONNX forms are right for all numbers.

    Forms that overflow, or lose what is small, are right on most examples: no comparison in onnxruntime tells. The
    logarithm of a sigmoid is one operator, however it was written. Complex numbers are moved about as pairs.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, joined = graph_module.graph, 0
        for node in graph.find_nodes(op="call_function", target=aten.log.default):
            inner = node.args[0]
            if isinstance(inner, fx.Node) and inner.target is aten.sigmoid.default:
                node.target, node.args = aten.log_sigmoid.default, inner.args
                joined += 1
        written = inline_calls(graph, lambda n: trace_call(n, form) if (form := form_of(n)) else None)
        if not joined + written:
            return PassResult.unchanged(graph_module, "torch's exporter writes all operators as they are")
        return PassResult(graph_module=graph_module, modified=True)
