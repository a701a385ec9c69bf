"""Where an attention stands, however it is written: the same queries, keys and values, and the same scale.

B batch, T time, D width, H heads, C width of a head
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from tests.captured import traced
from tests.models import seeded, vectors
from thesean.passes.analyse.dataflow import side_slice
from thesean.passes.analyse.regions import Region
from thesean.passes.analyse.scores import Core, find_core, read_scores
from thesean.passes.graph.record import record

BATCH, TIME, HEADS, WIDTH = 2, 5, 3, 4

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Written(nn.Module):
    """x_BTD -> y_BHTC, whatever layout it comes in, of queries, keys and values that one product makes."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(8, 3 * HEADS * WIDTH), attend

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(*self.heads(x))


def _einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bhtc,bhsc->bhts", q, k).softmax(-1)
    return torch.einsum("bhts,bhsc->bhtc", weights, v)


def _keys_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("b h s c, b h t c -> b h t s", k, q * 0.5).softmax(-1)
    return torch.einsum("bhts,bhsc->bthc", weights, v)


def _heads_behind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (torch.einsum("bihc,bjhc->bhij", q, k) / 3).softmax(-1)
    return torch.einsum("bhij,bjhc->bihc", weights, v)


def _in_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, TIME, WIDTH) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.7).softmax(-1), v).view(BATCH, HEADS, TIME, WIDTH)


def _added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, TIME, WIDTH) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(1, TIME, TIME), q, k.transpose(1, 2), alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).view(BATCH, HEADS, TIME, WIDTH)


# how it is written, and its scale
WRITTEN: dict[str, tuple[Attend, float]] = {
    "fused": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 1 / math.sqrt(WIDTH)),
    "fused with a scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 0.3),
    "fused with a mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(TIME, TIME, dtype=torch.bool)), 0.5
    ),
    "products": (lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v, 0.25),
    "products of the other way": (lambda q, k, v: (-q @ k.mT / 5).softmax(3) @ v, -0.2),
    "weights that are dropped in training": (
        lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v, 1.0
    ),
    "einsum": (_einsum, 1.0),
    "einsum with keys first": (_keys_first, 0.5),
    "einsum with heads behind": (_heads_behind, 1 / 3),
    "batch and heads in one": (_in_one, 0.7),
    "a product that adds": (_added, 0.25),
}  # fmt: skip


def core_of(model: nn.Module) -> tuple[Core | None, Region, dict[fx.Node, Any]]:
    x_BTD = vectors(BATCH, TIME, 8)
    graph_module = traced(model, x_BTD)
    values = dict(record(graph_module, {"x": x_BTD}))
    side = side_slice(graph_module.graph)
    nodes = tuple(n for n in graph_module.graph.nodes if n.op == "call_function" and n not in side)
    (entry,) = graph_module.graph.find_nodes(op="placeholder")
    region = Region(entry=entry, exit=nodes[-1], nodes=nodes)
    return find_core(region, values), region, values


@pytest.mark.parametrize("name", WRITTEN)
def test_queries_keys_values_and_scale_are_read_however_an_attention_is_written(name):
    attend, scale = WRITTEN[name]
    model: Any = seeded(Written, attend)
    core, region, values = core_of(model)
    assert core is not None
    query, key, value = model.heads(vectors(BATCH, TIME, 8))
    factor = 0.5 if name == "einsum with keys first" else -1.0 if name == "products of the other way" else 1.0
    torch.testing.assert_close(core.query.of(values[core.query.node]), query * factor)
    torch.testing.assert_close(core.key.of(values[core.key.node]), key)
    torch.testing.assert_close(core.value.of(values[core.value.node]), value)
    assert sorted(values[core.mixed].shape) == sorted((BATCH, HEADS, TIME, WIDTH))
    scores = read_scores(region, values, core)
    assert (scores.bias, scores.differs) == (None, "")
    assert scores.scale * factor == pytest.approx(scale, rel=1e-5)


NONE: dict[str, Attend] = {
    "no softmax": lambda q, k, v: (q @ k.mT * 0.25) @ v,
    "two of them": lambda q, k, v: (q @ k.mT).softmax(-1) @ v + (k @ q.mT).softmax(-1) @ v,
    "two fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(k, q, v),
    "scores of two products": lambda q, k, v: (q @ k.mT + k @ q.mT).softmax(-1) @ v,
    "weights that are read twice": lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w.sum(-1, keepdim=True),
    "weights that nothing is multiplied with": lambda q, k, v: (q @ k.mT).softmax(-1),
    "a softmax of no product": lambda q, k, v: q.softmax(-1) @ v.mT,
    "three dimensions": lambda q, k, v: (q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0],
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_single_attention_is_none(name):
    core, *_ = core_of(seeded(Written, NONE[name]))
    assert core is None


def _sinking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    sinks = torch.arange(HEADS).view(1, -1, 1, 1).expand(BATCH, -1, TIME, 1)
    both = torch.cat([q @ k.mT * 0.5, sinks], -1)
    return (both - both.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def _draining(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * 0.5
    share = (scores.logsumexp(-1, keepdim=True) - torch.arange(HEADS).view(-1, 1, 1)).sigmoid()
    return (scores.softmax(-1) @ v) * share


BENT: dict[str, tuple[Attend, str]] = {
    "capped": (lambda q, k, v: ((q @ k.mT / 9).tanh() * 9).softmax(-1) @ v, "a cap on the scores"),
    "of pairs of keys": (
        lambda q, k, v: (q @ k.mT)[..., 1:].softmax(-1) @ v[:, :, 1:], "scores that aren't one of each query and key"
    ),
    "with a sink behind": (_sinking, "a sink among the scores, which takes its share of the weights"),
    "with a sink that is taken off": (_draining, "a sink among the scores, which takes its share of the weights"),
    "with a sink in front": (
        lambda q, k, v: F.pad(q @ k.mT * 0.5, (1, 0), value=2.0).softmax(-1)[..., 1:] @ v,
        "a sink among the scores, which takes its share of the weights",
    ),
    "with more for some rows": (
        lambda q, k, v: (q @ k.mT + torch.arange(BATCH).view(-1, 1, 1, 1) * torch.eye(TIME)).softmax(-1) @ v,
        "a bias on the scores that is no matter of distance alone",
    ),
    "with more for some keys": (
        lambda q, k, v: (q @ k.mT + torch.arange(TIME).square()).softmax(-1) @ v,
        "a bias on the scores that is no matter of distance alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BENT)
def test_scores_that_are_more_than_a_scale_are_told(name):
    attend, why = BENT[name]
    core, region, values = core_of(seeded(Written, attend))
    assert core is not None
    scores = read_scores(region, values, core)
    assert scores.differs == why
    if "sink" in name:
        assert scores.bias is None
        assert scores.scale == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("shape", [(TIME, TIME), (1, TIME, TIME), (1, 1, TIME, TIME), (HEADS, TIME, TIME)])
def test_a_bias_of_the_distance_is_read_in_any_shape_that_is_added(shape):
    step_T = torch.arange(TIME)
    bias = -0.5 * (step_T[:, None] - step_T).abs().expand(shape)
    core, region, values = core_of(seeded(Written, lambda q, k, v: (q @ k.mT + bias).softmax(-1) @ v))
    assert core is not None
    scores = read_scores(region, values, core)
    assert scores.differs == ""
    assert scores.scale == pytest.approx(1.0, rel=1e-5)
    assert scores.bias is not None
    torch.testing.assert_close(
        scores.bias.matrix(TIME, torch.zeros(HEADS)),
        bias.expand(HEADS, TIME, TIME) if len(shape) < 4 else bias[0].expand(HEADS, -1, -1),
    )
