"""Attentions that are drawn, from the stream to what is added to it: projections, norms, rotation, scale and bias are
read back as the numbers that they were made of.

B batch, T time, D width, H heads, G heads of keys and values, C width of a head
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import vectors
from tests.written import ends, written
from thesean.passes.analyse.attention import find_attention
from thesean.passes.analyse.dataflow import side_slice
from thesean.passes.analyse.regions import Region
from thesean.passes.graph.record import record
from thesean.targets.shared.facts import AttentionFacts

aten = torch.ops.aten
BATCH, TIME, HEADS, C = 2, 7, 4, 6
D = 10
ANGLES = [0.7, 0.2, 0.05]


@dataclass(frozen=True)
class Spec:
    product: str = "matmul"  # "bmm", "fused"
    groups: int = HEADS
    packed: bool = False  # one matrix makes queries, keys and values
    biased: bool = True
    scale: float = C**-0.5
    causal: bool = False
    slope: float = 0.0
    rotated: bool = False
    normed: bool = False
    shift: float = 0.0  # of all scores alike, which is nothing
    cap: float | None = None
    gate: bool = False
    bent: str = ""  # queries, keys or both, by a function


def drawn(seed: int) -> Spec:
    r = random.Random(seed)
    groups = r.choice([HEADS, 2, 1])
    return Spec(
        product=r.choice(["matmul", "bmm", "fused"]),
        groups=groups,
        packed=r.random() < 0.5,
        biased=r.random() < 0.5,
        scale=r.choice([0.25, C**-0.5, 1.0]),
        causal=r.random() < 0.5,
        slope=r.choice([0.0, 0.0, 0.3]),
        rotated=r.random() < 0.4,
        normed=r.random() < 0.3,
        shift=r.choice([0.0, 1.5]),
    )


def weights(spec: Spec) -> dict[str, torch.Tensor]:
    rows = {"q": HEADS * C, "k": spec.groups * C, "v": spec.groups * C, "o": D}
    found = {n: vectors(size, D if n != "o" else HEADS * C, seed=at) / 3 for at, (n, size) in enumerate(rows.items())}
    found |= {f"{n}b": vectors(size, seed=10 + at) for at, (n, size) in enumerate(rows.items())}
    found |= {f"{n}n": vectors(C, seed=20 + at).abs() + 0.5 for at, n in enumerate("qk")}
    if spec.packed:
        found["qkv"], found["qkvb"] = (torch.cat([found[n + end] for n in "qkv"]) for end in ("", "b"))
    return found


def turned(c: Any, x: Any, cos: Any, sin: Any) -> Any:
    first, second = (c(aten.slice.Tensor, x, 3, at, at + C // 2) for at in (0, C // 2))
    one = c(aten.sub.Tensor, c(aten.mul.Tensor, first, cos), c(aten.mul.Tensor, second, sin))
    two = c(aten.add.Tensor, c(aten.mul.Tensor, second, cos), c(aten.mul.Tensor, first, sin))
    return c(aten.cat.default, [one, two], 3)


def attention(c: Any, x: Any, spec: Spec, w: dict[str, Any]) -> Any:
    counts = {"q": HEADS, "k": spec.groups, "v": spec.groups}
    if spec.packed:
        whole = c(aten.linear.default, x, w["qkv"], *([w["qkvb"]] if spec.biased else []))
        starts = {"q": 0, "k": HEADS * C, "v": (HEADS + spec.groups) * C}
        flat = {n: c(aten.slice.Tensor, whole, 2, s, s + counts[n] * C) for n, s in starts.items()}
    else:
        flat = {n: c(aten.linear.default, x, w[n], *([w[n + "b"]] if spec.biased else [])) for n in counts}
    heads = {
        n: c(aten.transpose.int, c(aten.view.default, v, [BATCH, TIME, counts[n], C]), 1, 2) for n, v in flat.items()
    }
    for n in "qk":
        if spec.normed:
            mean = c(aten.mean.dim, c(aten.pow.Tensor_Scalar, heads[n], 2), [-1], True)
            normed = c(aten.mul.Tensor, heads[n], c(aten.rsqrt.default, c(aten.add.Scalar, mean, 1e-5)))
            heads[n] = c(aten.mul.Tensor, normed, w[n + "n"])
        if spec.rotated:
            heads[n] = turned(c, heads[n], w["cos"], w["sin"])
    heads |= {n: c(aten.tanh.default, heads[n]) for n in spec.bent}
    if spec.groups < HEADS:
        heads |= {n: c(aten.repeat_interleave.self_int, heads[n], HEADS // spec.groups, 1) for n in "kv"}
    q, k, v = (heads[n] for n in "qkv")
    added = w["added"]
    if spec.product == "fused":
        return c(aten.scaled_dot_product_attention.default, q, k, v, added, scale=spec.scale)
    if spec.product == "bmm":
        q, k, v = (c(aten.reshape.default, t, [BATCH * HEADS, TIME, C]) for t in (q, k, v))
    scores = c(aten.bmm.default if spec.product == "bmm" else aten.matmul.default, q, c(aten.transpose.int, k, -2, -1))
    scores = c(aten.mul.Tensor, scores, spec.scale)
    if spec.cap is not None:
        scores = c(aten.mul.Tensor, c(aten.tanh.default, c(aten.div.Tensor, scores, spec.cap)), spec.cap)
    if spec.product == "bmm":
        scores = c(aten.view.default, scores, [BATCH, HEADS, TIME, TIME])
    soft = c(aten.softmax.int, c(aten.add.Tensor, scores, added), -1)
    if spec.gate:
        soft = c(aten.mul.Tensor, soft, 0.5)
    if spec.product == "bmm":
        mixed = c(aten.bmm.default, c(aten.view.default, soft, [BATCH * HEADS, TIME, TIME]), v)
        return c(aten.view.default, mixed, [BATCH, HEADS, TIME, C])
    return c(aten.matmul.default, soft, v)


def facts_of(spec: Spec) -> AttentionFacts | None:
    held = {n: nn.Parameter(v) for n, v in weights(spec).items()}
    step = torch.arange(TIME)
    age = step.unsqueeze(1) - step
    added = (-spec.slope * age.abs()).float() + spec.shift
    added = added.masked_fill(age < 0, -1e9) if spec.causal else added
    angle = step.unsqueeze(1) * torch.tensor(ANGLES)

    def made(c: Any, x: Any, **w: Any) -> Any:
        mixed = attention(c, c(aten.tanh.default, x), spec, w)
        flat = c(aten.reshape.default, c(aten.transpose.int, mixed, 1, 2), [BATCH, TIME, HEADS * C])
        return c(aten.linear.default, flat, w["o"], w["ob"])

    x = vectors(BATCH, TIME, D)
    graph_module = written(
        made, x, added=added.expand(1, 1, TIME, TIME).clone(), cos=angle.cos(), sin=angle.sin(), **held
    )
    side = side_slice(graph_module.graph)
    entry = next(n for n in graph_module.graph.nodes if n.target is aten.tanh.default)
    nodes = tuple(n for n in graph_module.graph.nodes if n.op == "call_function" and n not in side and n is not entry)
    return find_attention(Region(entry=entry, exit=ends(graph_module), nodes=nodes), record(graph_module, {"x_0": x}))


def each_head(rows: torch.Tensor, spec: Spec) -> torch.Tensor:
    return rows.unflatten(0, (spec.groups, C)).repeat_interleave(HEADS // spec.groups, 0).flatten(0, 1)


@pytest.mark.parametrize("seed", range(24))
def test_what_an_attention_is_made_of_is_read_back(seed):
    spec = drawn(seed)
    facts, w = facts_of(spec), weights(spec)
    assert facts is not None
    assert (facts.plain, facts.differs, facts.heads) == (True, "", HEADS)
    for found, name in ((facts.query, "q"), (facts.key, "k"), (facts.value, "v")):
        weight, bias = w[name], w[name + "b"] * spec.biased
        if name != "q":
            weight, bias = each_head(weight, spec), each_head(bias, spec)
        torch.testing.assert_close(found.weight_OI, weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.bias_O, bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(facts.output.weight_OI, w["o"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(facts.output.bias_O, w["ob"], rtol=1e-4, atol=1e-4)
    assert facts.scale == pytest.approx(spec.scale, rel=1e-4)
    assert (facts.rotation is None) == (not spec.rotated)
    if facts.rotation is not None:
        assert list(zip(*facts.rotation[:2], strict=True)) == [(0, 3), (1, 4), (2, 5)]
        assert facts.rotation.angle == pytest.approx(ANGLES, rel=1e-4)
    assert (facts.norms is None) == (not spec.normed)
    for norm, name in zip(facts.norms or (), ("qn", "kn"), strict=False):
        torch.testing.assert_close(norm.weight, w[name], rtol=1e-3, atol=1e-4)
        assert norm.eps == pytest.approx(1e-5, rel=5e-2)
    assert (facts.bias is None) == (spec.slope == 0)
    if facts.bias is not None:
        torch.testing.assert_close(facts.bias.behind.slope_H, torch.full((HEADS,), -spec.slope), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        ({"cap": 0.5}, "a cap on the scores"),
        ({"gate": True}, None),
        ({"gate": True, "product": "bmm", "causal": True}, None),
    ],
)
def test_what_is_more_than_that_is_told(more, differs):
    facts = facts_of(replace(Spec(), **more))
    assert facts is not None
    if differs is None:  # a factor of the weights is one of the values', or of what is made of them
        assert facts.plain or facts.differs == "more than was read off"
        if facts.plain:
            assert math.isclose(float(facts.output.weight_OI.norm() / weights(Spec())["o"].norm()), 0.5, rel_tol=1e-3)
    else:
        assert (facts.plain, facts.differs) == (False, differs)


@pytest.mark.parametrize("bent", ["q", "k", "qk"])
@pytest.mark.parametrize("packed", [False, True])
def test_of_queries_that_are_changed_otherwise_the_projection_is_known(bent, packed):
    spec = Spec(bent=bent, packed=packed)
    facts, w = facts_of(spec), weights(spec)
    assert facts is not None
    assert (facts.plain, facts.differs) == (False, "queries and keys that are changed before they meet")
    for found, name in ((facts.query, "q"), (facts.key, "k"), (facts.value, "v")):
        torch.testing.assert_close(found.weight_OI, w[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.bias_O, w[name + "b"], rtol=1e-4, atol=1e-4)


def test_of_values_that_are_changed_it_is_told():
    facts = facts_of(Spec(bent="v"))
    assert facts is not None
    assert (facts.plain, facts.differs) == (False, "more than was read off")
    torch.testing.assert_close(facts.value.weight_OI, weights(Spec())["v"], rtol=1e-4, atol=1e-4)
