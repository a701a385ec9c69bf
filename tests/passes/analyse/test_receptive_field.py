"""B batch, T time, C channels, K kernel size"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from thesean.passes.analyse.receptive_field import receptive_field

aten = torch.ops.aten

Made = Callable[..., Any]

# what is made of x_BCT and a weight of 5 steps, and how many other steps it needs
KERNELS: dict[str, tuple[Made, int]] = {
    "a convolution": (lambda c, x, w: c(aten.conv1d.default, x, w), 4),
    "one with holes": (lambda c, x, w: c(aten.conv1d.default, x, w, None, [1], [0], [3]), 12),
    "one with holes, by name": (lambda c, x, w: c(aten.conv1d.default, x, w, dilation=2), 8),
    "one that is padded": (lambda c, x, w: c(aten.conv1d.padding, x, w, None, [1], "same", [2]), 8),
    "a transposed one": (lambda c, x, w: c(aten.conv_transpose1d.default, x, w, None, [7], [0], [0], 1, [2]), 8),
    "a maximum": (lambda c, x, w: c(aten.max_pool1d.default, x, [3]), 2),
    "an average": (lambda c, x, w: c(aten.avg_pool1d.default, x, 4), 3),
    "two in a row": (lambda c, x, w: c(aten.conv1d.default, c(aten.max_pool1d.default, x, [3]), w), 6),
    "an image's": (lambda c, x, w: c(aten.conv2d.default, x, w), 0),
    "an attention": (lambda c, x, w: c(aten.scaled_dot_product_attention.default, x, x, x), 0),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_see_as_far_as_they_are_long_and_one_after_the_other_adds_up(kernel):
    made, steps = KERNELS[kernel]
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    weight.meta["val"] = torch.empty(2, 3, 5)
    graph.output(made(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), x, weight))
    assert receptive_field(graph) == steps


def test_a_kernel_whose_size_is_not_known_is_one_step():
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output(graph.call_function(aten.conv1d.default, (x, weight, None, [1], [0], [9])))
    assert receptive_field(graph) == 0
