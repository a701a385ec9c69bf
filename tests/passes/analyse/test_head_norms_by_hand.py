"""A norm of heads, as numbers alone, in each layout and with each kind of weight.

B batch, T time, G heads, C width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.captured import traced
from thesean.passes.analyse.head_norms import Found, find_norm, heads_of
from thesean.passes.graph.record import record
from thesean.targets.shared.facts import Affine
from thesean.targets.shared.head_norm import HeadNorm

BATCH, TIME, HEADS, WIDTH = 2, 5, 3, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X_BTGC = drawn(BATCH, TIME, HEADS, WIDTH)


@pytest.mark.parametrize(
    "value", [X_BTGC, X_BTGC.transpose(1, 2), X_BTGC.flatten(2)], ids=["steps first", "heads first", "heads in one"]
)
def test_heads_are_read_in_any_layout(value):
    found = heads_of(value, BATCH, TIME, WIDTH)
    assert found is not None
    torch.testing.assert_close(found, X_BTGC)


@pytest.mark.parametrize(
    "value",
    [
        None, 3, drawn(BATCH, TIME), drawn(BATCH, 1, TIME, HEADS, WIDTH), drawn(BATCH + 1, TIME, HEADS, WIDTH),
        drawn(BATCH, TIME, TIME, WIDTH), drawn(BATCH, 7, HEADS, WIDTH), drawn(BATCH, TIME, HEADS, WIDTH + 1),
        drawn(BATCH, TIME, HEADS, 2 * WIDTH), drawn(BATCH, TIME, 3 * WIDTH + 1), drawn(BATCH, HEADS * WIDTH, TIME),
    ],
)  # fmt: skip
def test_what_holds_no_heads_of_this_width_is_none(value):
    assert heads_of(value, BATCH, TIME, WIDTH) is None


class Normed(nn.Module):
    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def found_in(norm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor = X_BTGC) -> Found | None:
    graph_module = traced(Normed(norm), x)
    values: dict[Any, Any] = dict(record(graph_module, {"x": x}))
    (source,) = graph_module.graph.find_nodes(op="placeholder")
    run = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    return find_norm(values, run, source, WIDTH, TIME)


WEIGHT_C, BIAS_C = drawn(WIDTH, seed=1).abs() + 0.5, drawn(WIDTH, seed=2)
WEIGHT_GC, BIAS_GC = drawn(HEADS, WIDTH, seed=3).abs() + 0.5, drawn(HEADS, WIDTH, seed=4)


def rms(x: torch.Tensor, eps: float, dims: tuple[int, ...] = (-1,), centred: bool = False) -> torch.Tensor:
    x = x - x.mean(dims, keepdim=True) if centred else x
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()


# what is computed, and the norm that it is: eps, weight, bias, whether over all heads, and about their mean
NORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], HeadNorm, bool]] = {
    "one weight": (lambda x: rms(x, 1e-6) * WEIGHT_C, HeadNorm(WEIGHT_C, 1e-6), False),
    "a large eps": (lambda x: rms(x, 1e-2) * WEIGHT_C, HeadNorm(WEIGHT_C, 1e-2), False),
    "no weight": (lambda x: rms(x, 1e-5), HeadNorm(torch.ones(WIDTH), 1e-5), False),
    "one weight and bias": (lambda x: rms(x, 1e-6) * WEIGHT_C + BIAS_C, HeadNorm(WEIGHT_C, 1e-6, BIAS_C), False),
    "a weight a head": (lambda x: rms(x, 1e-6) * WEIGHT_GC, HeadNorm(WEIGHT_GC, 1e-6), False),
    "a bias a head": (
        lambda x: rms(x, 1e-6) * WEIGHT_GC + BIAS_GC, HeadNorm(WEIGHT_GC, 1e-6, BIAS_GC), False
    ),
    "over all heads": (
        lambda x: rms(x, 1e-6, (-2, -1)) * WEIGHT_GC, HeadNorm(WEIGHT_GC, 1e-6, whole=True), False
    ),
    "about the mean": (
        lambda x: rms(x, 1e-6, centred=True) * WEIGHT_C + BIAS_C, HeadNorm(WEIGHT_C, 1e-6, BIAS_C), True
    ),
    "about the mean of all heads": (
        lambda x: rms(x, 1e-6, (-2, -1), True) * WEIGHT_GC, HeadNorm(WEIGHT_GC, 1e-6, whole=True), True
    ),
    "moved behind": (lambda x: (rms(x, 1e-6) * WEIGHT_C).transpose(1, 2), HeadNorm(WEIGHT_C, 1e-6), False),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_read_off_with_its_weight_bias_and_eps(name):
    norm, wanted, centred = NORMS[name]
    found = found_in(norm)
    assert found is not None
    assert (found.centred, found.norm.whole) == (centred, wanted.whole)
    assert found.norm.eps == pytest.approx(wanted.eps, rel=0.05)
    torch.testing.assert_close(found.norm.weight, wanted.weight, rtol=1e-3, atol=1e-4)
    assert (found.norm.bias is None) == (wanted.bias is None)
    if found.norm.bias is not None:
        torch.testing.assert_close(found.norm.bias, wanted.bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * WEIGHT_C,
        lambda x: x / x.abs().sum(-1, keepdim=True),
        lambda x: rms(x, 1e-6).tanh(),
        lambda x: rms(x, 1e-6).cumsum(1),
        lambda x: rms(x, 4.0),  # which is hardly one
        lambda x: x.softmax(-1),
        lambda x: rms(x, 1e-6)[:, :, :2],
    ],
)
def test_what_is_no_such_norm_is_none(change):
    found = found_in(change)
    assert found is None or found.node.users  # no more than what stands before it


def test_the_mean_is_taken_off_the_map_to_the_source():
    """affine rows less their mean, over a head's or over all."""
    affine = Affine(drawn(HEADS * WIDTH, 6, seed=5), drawn(HEADS * WIDTH, seed=6))
    x_D = drawn(6, seed=7)
    y_GC = (affine.weight_OI @ x_D + affine.bias_O).view(HEADS, WIDTH)
    node: Any = None
    for whole, mean in ((False, y_GC.mean(1, keepdim=True)), (True, y_GC.mean())):
        norm = HeadNorm(WEIGHT_GC, 1e-6, whole=whole)
        centred = Found(norm, node, centred=True).centre(affine, WIDTH)
        torch.testing.assert_close((centred.weight_OI @ x_D + centred.bias_O).view(HEADS, WIDTH), y_GC - mean)
        assert Found(norm, node, centred=False).centre(affine, WIDTH) is affine
