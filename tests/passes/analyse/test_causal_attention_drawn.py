"""Attentions that are drawn: how scores are computed, scaled, bent, masked, biased and grouped; and read back.

B batch, T time, H heads, G heads of keys and values, C width of a head
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.models import vectors
from tests.written import written
from thesean.errors import PassRefused
from thesean.passes.analyse.attention_cores import CausalAttention
from thesean.passes.analyse.causal_attention import causal_attentions
from thesean.passes.graph.signature import InputSpec, Signature

aten = torch.ops.aten
HEADS, C = 4, 3


@dataclass(frozen=True)
class Spec:
    """What is computed; `ahead`: later keys that a query sees."""

    product: str = "matmul"  # "bmm", "baddbmm", "fused"
    scale: float = 0.5
    scaled: str = "behind"  # "before", "divided", "number", "alpha"
    cap: float | None = None
    window: int | None = None
    hidden: str = "filled"  # "where", "added", "lent": of the scores' kind
    low: float = -1e9
    mask: str | None = None  # "true", "one", "additive"
    slope: float = 0.0
    groups: int = HEADS
    repeated: str = "interleaved"  # "expanded"
    ahead: int = 0


def drawn(seed: int) -> Spec:
    r = random.Random(seed)
    product = r.choice(["matmul", "matmul", "bmm", "baddbmm", "fused"])
    groups = r.choice([HEADS, 2, 1])
    fused = product == "fused"
    window = r.choice([None, 1, 3, 30])
    return Spec(
        product=product,
        scale=r.choice([0.25, 1.0, 3**-0.5]),
        scaled=r.choice(["behind", "before", "divided", "number"]),
        cap=None if fused else r.choice([None, None, 2.0]),
        window=window,
        hidden=r.choice(["filled", "where", "added", "lent"]),
        low=r.choice([-1e9, float("-inf"), torch.finfo(torch.float32).min]),
        mask=r.choice([None, "true", "one"]),
        slope=0.0 if window is not None else r.choice([0.0, 0.0, 0.25]),
        groups=groups,
        repeated=r.choice(["interleaved", "expanded"]),
    )


def size(c: Any, x: Any, dim: int) -> Any:
    return c(aten.sym_size.int, x, dim)


def repeated(c: Any, x: Any, spec: Spec) -> Any:
    if spec.groups == HEADS:
        return x
    if spec.repeated == "interleaved":
        return c(aten.repeat_interleave.self_int, x, HEADS // spec.groups, 1)
    rows, steps = size(c, x, 0), size(c, x, 2)
    wide = c(aten.expand.default, c(aten.unsqueeze.default, x, 2), [rows, spec.groups, HEADS // spec.groups, steps, C])
    return c(aten.reshape.default, wide, [rows, HEADS, steps, C])


def heads(c: Any, x: Any, weight: Any, count: int) -> Any:
    rows = c(aten.view.default, c(aten.linear.default, x, weight), [size(c, x, 0), size(c, x, 1), count, C])
    return c(aten.transpose.int, rows, 1, 2)


def age(c: Any, x: Any) -> Any:
    step = c(aten.arange.default, size(c, x, 1))
    return c(aten.sub.Tensor, c(aten.unsqueeze.default, step, 1), step)


def hidden_from(c: Any, x: Any, mask: Any, spec: Spec) -> Any:
    hidden = c(aten.lt.Scalar, age(c, x), -spec.ahead)
    if spec.window is not None:
        hidden = c(aten.logical_or.default, hidden, c(aten.ge.Scalar, age(c, x), spec.window))
    if mask is not None:
        shown = c(aten.eq.Scalar, mask, 0) if spec.mask == "one" else c(aten.logical_not.default, mask)
        hidden = c(aten.logical_or.default, hidden, c(aten.unsqueeze.default, c(aten.unsqueeze.default, shown, 1), 1))
    return hidden


def masked(c: Any, scores: Any, hidden: Any, spec: Spec) -> Any:
    if spec.hidden == "filled":
        return c(aten.masked_fill.Scalar, scores, hidden, spec.low)
    if spec.hidden == "where":
        return c(aten.where.self, hidden, c(aten.full.default, [], spec.low), scores)
    if spec.hidden == "lent":
        return c(aten.add.Tensor, scores, c(aten.mul.Tensor, c(aten.type_as.default, hidden, scores), -1e9))
    return c(aten.add.Tensor, scores, c(aten.mul.Tensor, c(aten.to.dtype, hidden, torch.float32), -1e9))


def attention(c: Any, x: Any, mask: Any, spec: Spec, q: Any, k: Any, v: Any) -> Any:
    query = heads(c, x, q, HEADS)
    key, value = (repeated(c, heads(c, x, w, spec.groups), spec) for w in (k, v))
    hidden = hidden_from(c, x, mask, spec)
    if spec.product == "fused":
        if spec.window is None and mask is None and not spec.slope:
            given: tuple[Any, ...] = (None, 0.0, True)
        elif spec.slope:
            bias = c(aten.mul.Tensor, age(c, x), -spec.slope)
            given = (c(aten.masked_fill.Scalar, bias, hidden, -1e9),)
        else:
            given = (c(aten.logical_not.default, hidden),)
        return c(aten.scaled_dot_product_attention.default, query, key, value, *given, scale=spec.scale)
    rows, steps = size(c, x, 0), size(c, x, 1)
    packed = spec.product != "matmul"
    if spec.scaled == "before":
        query = c(aten.mul.Tensor, query, spec.scale)
    if packed:
        query, key, value = (c(aten.flatten.using_ints, t, 0, 1) for t in (query, key, value))
    turned = c(aten.transpose.int, key, -2, -1)
    if spec.product == "baddbmm":
        nothing = c(aten.zeros.default, [1, 1, 1])
        scores = c(aten.baddbmm.default, nothing, query, turned)
    else:
        scores = c(aten.bmm.default if packed else aten.matmul.default, query, turned)
    if packed:
        scores = c(aten.unflatten.int, scores, 0, [-1, HEADS])
    match spec.scaled:
        case "behind":
            scores = c(aten.mul.Tensor, scores, c(aten.full.default, [1], spec.scale))
        case "divided":
            scores = c(aten.div.Tensor, scores, 1 / spec.scale)
        case "number":
            scores = c(aten.mul.Scalar, scores, spec.scale)
    if spec.cap is not None:
        scores = c(aten.mul.Tensor, c(aten.tanh.default, c(aten.div.Tensor, scores, spec.cap)), spec.cap)
    if spec.slope:
        scores = c(aten.sub.Tensor, scores, c(aten.mul.Tensor, age(c, x), spec.slope))
    weights = c(aten.softmax.int, masked(c, scores, hidden, spec), -1)
    if not packed:
        return c(aten.matmul.default, weights, value)
    mixed = c(aten.bmm.default, c(aten.flatten.using_ints, weights, 0, 1), value)
    return c(aten.view.default, mixed, [rows, HEADS, steps, C])


def network(spec: Spec) -> tuple[fx.GraphModule, Signature]:
    kinds = {"true": torch.bool, "one": torch.int64}
    mask = None if spec.mask is None else torch.ones(2, 5, dtype=kinds[spec.mask])
    width = HEADS * C

    def made(c: Any, x: Any, *given: Any, q: Any, k: Any, v: Any, o: Any) -> Any:
        mixed = attention(c, c(aten.linear.default, x, o), given[0] if given else None, spec, q, k, v)
        return c(aten.linear.default, c(aten.flatten.using_ints, c(aten.transpose.int, mixed, 1, 2), 2, 3), o)

    held = {
        name: nn.Parameter(vectors(rows * C, width, seed=at) / 2)
        for at, (name, rows) in enumerate([("q", HEADS), ("k", spec.groups), ("v", spec.groups), ("o", HEADS)])
    }
    inputs = (vectors(2, 5, width), *(() if mask is None else (mask,)))
    specs = [InputSpec(name="x_0", dtype=torch.float32, shape=("batch", "time", width))]
    if mask is not None:
        specs.append(InputSpec(name="x_1", dtype=mask.dtype, shape=("batch", "time"), example=mask))
    return written(made, *inputs, **held), Signature(inputs=tuple(specs))


def read(spec: Spec) -> list[CausalAttention]:
    return causal_attentions(*network(spec))


@pytest.mark.parametrize("seed", range(30))
def test_what_is_drawn_is_read_back(seed):
    spec = drawn(seed)
    graph_module, signature = network(spec)
    (core,) = causal_attentions(graph_module, signature)
    scale = 1.0 if spec.scaled == "before" and spec.product != "fused" else spec.scale
    assert core.scale == pytest.approx(scale)
    assert core.cap == spec.cap
    assert core.window == spec.window
    assert core.packed == (HEADS if spec.product in ("bmm", "baddbmm") else 0)
    assert core.widths == (C, C, C)
    assert (core.padding is None) == (spec.mask is None)
    if core.padding is not None:
        node = next(n for n in graph_module.graph.nodes if n.name == core.padding.node)
        assert core.padding.seen(core.padding.all_seen(node.meta["val"])).all()
    assert (core.distance is None) == (spec.slope == 0)
    if core.distance is not None:
        torch.testing.assert_close(core.distance.slope_H, torch.full_like(core.distance.slope_H, -spec.slope))
        assert not core.counted
    shapes = [tuple(n.meta["val"].shape) for n in (core.query, core.key, core.value)]
    if core.packed:
        assert shapes == [(2 * HEADS, 5, C)] * 3
    else:
        assert shapes == [(2, HEADS, 5, C), *[(2, spec.groups, 5, C)] * 2]
    assert not core.turned


def test_what_sees_a_later_key_is_none_and_a_hole_is_refused():
    assert read(Spec(ahead=1)) == []
    assert read(Spec(ahead=1, product="bmm", hidden="added")) == []
    assert len(read(Spec())) == 1


@pytest.mark.parametrize("window", [10, 11, 12, 13])
def test_a_window_about_as_long_as_what_is_looked_at_is_read(window):
    assert [core.window for core in read(Spec(window=window))] == [window]
    assert [core.window for core in read(Spec(window=window, product="fused"))] == [window]


# what is made of the scores, and whether it is told that it can't be kept, or no attention at all
OTHERS: dict[str, tuple[Any, bool]] = {
    "a sink that is a key's own score": (
        lambda c, s: c(
            aten.slice.Tensor,
            c(aten.softmax.int, c(aten.cat.default, [c(aten.slice.Tensor, s, 3, 0, 1), s], 3), -1),
            3,
            1,
            2**63 - 1,
        ),
        False,
    ),
    "weights that are squared": (lambda c, s: c(aten.square.default, c(aten.softmax.int, s, -1)), False),
    "weights that are clamped": (
        lambda c, s: c(aten.softmax.int, c(aten.clamp.default, s, -3e4, 0.5), -1), True
    ),
    "scores of the third power": (lambda c, s: c(aten.softmax.int, c(aten.pow.Tensor_Scalar, s, 3), -1), True),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_cache_gives_is_refused_or_none(name):
    weigh, refused = OTHERS[name]

    def made(c: Any, x: Any, q: Any, k: Any, v: Any) -> Any:
        query, key, value = (heads(c, c(aten.linear.default, x, q), w, HEADS) for w in (q, k, v))
        scores = c(aten.matmul.default, query, c(aten.transpose.int, key, 2, 3))
        weights = weigh(c, masked(c, scores, hidden_from(c, x, None, Spec()), Spec(low=-1e4)))
        return c(aten.matmul.default, weights, value)

    width = HEADS * C
    held = {n: nn.Parameter(vectors(width, width, seed=at)) for at, n in enumerate("qkv")}
    graph_module = written(made, vectors(2, 5, width), **held)
    signature = Signature(inputs=(InputSpec(name="x_0", dtype=torch.float32, shape=("batch", "time", width)),))
    if not refused:
        assert causal_attentions(graph_module, signature) == []
        return
    with pytest.raises(PassRefused, match="cache attention: matmul_default_1: expected"):
        causal_attentions(graph_module, signature)
