"""What a region is said to compute, and how long that is said to take, one small graph at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import vectors
from tests.written import ends, written
from thesean.passes.analyse.describe import describe_operators
from thesean.passes.analyse.regions import Region
from thesean.passes.analyse.speed import G_PER_S, Kind, time_of_nodes

aten = torch.ops.aten

Made = Callable[..., Any]


def linear(c: Any, x: Any, w: Any) -> Any:
    return c(aten.linear.default, x, w)


def written_out(c: Any, q: Any, k: Any, v: Any) -> Any:
    scores = c(aten.matmul.default, q, c(aten.transpose.int, k, 1, 2))
    return c(aten.matmul.default, c(aten.softmax.int, c(aten.mul.Tensor, scores, 0.5), -1), v)


def attention(c: Any, x: Any, w: Any) -> Any:
    return written_out(c, linear(c, x, w), linear(c, x, w), linear(c, x, w))


def gated(c: Any, x: Any, w: Any) -> Any:
    both = c(aten.mul.Tensor, c(aten.silu.default, linear(c, x, w)), linear(c, x, w))
    return linear(c, both, w)


def mlp(c: Any, x: Any, w: Any) -> Any:
    return linear(c, c(aten.gelu.default, linear(c, x, w)), w)


def channelwise(c: Any, x: Any, d: Any) -> Any:
    return c(aten.conv1d.default, x, d, None, [1], [0], [1], 4)


# of x_BTD, a matrix and kernels of 4 channels
TOLD: dict[str, tuple[Made, str]] = {
    "nothing": (lambda c, x, w, k, d: c(aten.tanh.default, c(aten.layer_norm.default, x, [4])), ""),
    "a map": (lambda c, x, w, k, d: linear(c, x, w), "linear"),
    "two": (lambda c, x, w, k, d: linear(c, linear(c, x, w), w), "2 linear"),
    "a map and its function": (lambda c, x, w, k, d: c(aten.relu.default, linear(c, x, w)), "linear"),
    "an mlp": (lambda c, x, w, k, d: mlp(c, x, w), "mlp"),
    "two of them": (lambda c, x, w, k, d: mlp(c, mlp(c, x, w), w), "2 mlp"),
    "a gated one": (lambda c, x, w, k, d: gated(c, x, w), "gated mlp"),
    "an mlp and a map": (lambda c, x, w, k, d: linear(c, c(aten.neg.default, mlp(c, x, w)), w), "mlp + linear"),
    "a map and an mlp": (
        lambda c, x, w, k, d: c(aten.add.Tensor, linear(c, x, w), mlp(c, x, w)), "linear + mlp"
    ),
    "an attention": (lambda c, x, w, k, d: attention(c, x, w), "attention"),
    "an attention and its last map": (lambda c, x, w, k, d: linear(c, attention(c, x, w), w), "attention"),
    "an attention, and an mlp of it": (
        lambda c, x, w, k, d: mlp(c, c(aten.add.Tensor, x, linear(c, attention(c, x, w), w)), w), "attention + mlp"
    ),
    "an attention without maps": (lambda c, x, w, k, d: written_out(c, x, x, x), "attention"),
    "a fused one": (
        lambda c, x, w, k, d: c(aten.scaled_dot_product_attention.default, linear(c, x, w), linear(c, x, w), x),
        "attention",
    ),
    "weights that weigh nothing": (lambda c, x, w, k, d: c(aten.softmax.int, linear(c, x, w), -1), "linear"),
    "products that nothing weighs": (
        lambda c, x, w, k, d: c(aten.matmul.default, c(aten.matmul.default, x, c(aten.transpose.int, x, 1, 2)), x), ""
    ),
    "a product behind an attention's": (
        lambda c, x, w, k, d: c(
            aten.matmul.default, c(aten.transpose.int, written_out(c, x, x, x), 1, 2), x
        ),
        "attention",
    ),
    "a convolution": (lambda c, x, w, k, d: c(aten.conv1d.default, x, k, None, [1], [1]), "conv1d 3"),
    "two convolutions and another": (
        lambda c, x, w, k, d: channelwise(
            c, c(aten.conv1d.default, c(aten.conv1d.default, x, k, None, [1], [1]), k, None, [1], [1]), d
        ),
        "2 conv1d 3 + depthwise conv1d 2",
    ),
    "a convolution between functions": (
        lambda c, x, w, k, d: c(aten.relu.default, c(aten.conv1d.default, c(aten.relu.default, x), k, None, [1], [1])),
        "conv1d 3",
    ),
    "a running sum behind a map": (lambda c, x, w, k, d: c(aten.cumsum.default, linear(c, x, w), 1), "linear + cumsum"),
    "a flip before a map": (lambda c, x, w, k, d: linear(c, c(aten.flip.default, x, [1]), w), "flip + linear"),
    "a recurrence": (
        lambda c, x, w, k, d: c(
            aten.rnn_tanh.input, x, c(aten.zeros.default, [1, 2, 4]), [w, w], False, 1, 0.0, False, False, True
        ),
        "rnn_tanh",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_operators_are_told_in_their_order_and_counted(name):
    made, told = TOLD[name]
    held = {"w": vectors(4, 4), "k": vectors(4, 4, 3), "d": vectors(4, 1, 2)}
    graph_module = written(made, vectors(2, 4, 4), **{n: nn.Parameter(v) for n, v in held.items()})
    (entry,) = graph_module.graph.find_nodes(op="placeholder")
    nodes = tuple(n for n in graph_module.graph.nodes if n.op == "call_function")
    assert describe_operators(Region(entry=entry, exit=nodes[-1], nodes=nodes)) == told


def test_what_is_outside_of_a_region_is_not_told():
    graph_module = written(lambda c, x, w: mlp(c, mlp(c, x, w), w), vectors(2, 4, 4), w=nn.Parameter(vectors(4, 4)))
    row = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    for start, end, told in ((0, 3, "mlp"), (0, 2, "linear"), (1, 3, "linear"), (2, 5, "2 linear"), (1, 2, "")):
        region = Region(entry=row[0], exit=row[end - 1], nodes=tuple(row[start:end]))
        assert describe_operators(region) == told


# of x_BTD (2, 4, 4), a matrix, kernels (4, 4, 3), (4, 1, 2) of each channel and (4, 2, 2) of two: what kind of work
KINDS: dict[str, tuple[Made, Kind | None]] = {
    "a map": (lambda c, x, w, k, d, g: linear(c, x, w), "dense"),
    "a convolution": (lambda c, x, w, k, d, g: c(aten.conv1d.default, x, k), "dense"),
    "one of each channel": (lambda c, x, w, k, d, g: channelwise(c, x, d), "depthwise"),
    "one of groups": (lambda c, x, w, k, d, g: c(aten.conv1d.default, x, g, None, [1], [0], [1], 2), "grouped"),
    "the general one of groups": (
        lambda c, x, w, k, d, g: c(aten.convolution.default, x, g, None, [1], [0], [1], False, [0], 2), "grouped"
    ),
    "a function": (lambda c, x, w, k, d, g: c(aten.tanh.default, x), "elementwise"),
    "a rectifier": (lambda c, x, w, k, d, g: c(aten.relu.default, x), None),
    "a sum": (lambda c, x, w, k, d, g: c(aten.add.Tensor, x, x), None),
    "a view": (lambda c, x, w, k, d, g: c(aten.transpose.int, x, 1, 2), None),
    "what is made of weights": (lambda c, x, w, k, d, g: c(aten.tanh.default, w), None),
    "a size": (lambda c, x, w, k, d, g: c(aten.sym_size.int, x, 1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_time_is_work_by_the_rate_of_its_kind(name):
    made, kind = KINDS[name]
    held = {"w": vectors(4, 4), "k": vectors(4, 4, 3), "d": vectors(4, 1, 2), "g": vectors(4, 2, 2)}
    graph_module = written(made, vectors(2, 4, 4), **{n: nn.Parameter(v) for n, v in held.items()})
    node = ends(graph_module)
    flops = {node: 600} if kind in ("dense", "depthwise", "grouped") else {}
    found = time_of_nodes([node], flops, lambda n: 500)
    amount = 600 if flops else 500
    assert found == (0 if kind is None else pytest.approx(amount / G_PER_S[kind] * 1e-9))
    assert time_of_nodes([node, node], flops, lambda n: 500) == pytest.approx(2 * found)
