"""Masks of every kind, met by hidden states in every way, read by what they hide; and what is none of them.

B batch, T time, D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.models import vectors
from tests.written import written
from thesean.passes.analyse.dataflow import MASK, data_flow
from thesean.passes.analyse.padding import Padding, find_padding, padding_of, values_read
from thesean.passes.analyse.regions import Region
from thesean.passes.graph.record import record

aten = torch.ops.aten
TIME, WIDTH = 7, 4

Made = Callable[..., Any]

# of a rule: the type of a mask, and how it holds a token and a hidden step
KINDS: dict[str, tuple[torch.dtype, float, float]] = {
    "true": (torch.bool, True, False),
    "false": (torch.bool, False, True),
    "one": (torch.int64, 1, 0),
    "zero": (torch.int64, 0, 1),
    "one, of floats": (torch.float32, 1, 0),
    "zero, of floats": (torch.float32, 0, 1),
    "additive": (torch.float32, 0.0, -1e9),
}


def shown(c: Any, mask: Any, kind: str) -> Any:
    """Booleans of a mask, True for a token."""
    match kind.partition(",")[0]:
        case "true":
            return mask
        case "false":
            return c(aten.logical_not.default, mask)
        case "one":
            return c(aten.ne.Scalar, mask, 0)
        case "zero":
            return c(aten.eq.Scalar, mask, 0)
    return c(aten.gt.Scalar, mask, -1.0)


def scores(c: Any, x: Any) -> Any:
    return c(aten.matmul.default, c(aten.mul.Tensor, x, 0.3), c(aten.transpose.int, x, 1, 2))


def mixed(c: Any, scores_BTT: Any, x: Any) -> Any:
    return c(aten.add.Tensor, x, c(aten.matmul.default, c(aten.softmax.int, scores_BTT, -1), x))


def filled(c: Any, x: Any, seen: Any) -> Any:
    hidden = c(aten.unsqueeze.default, c(aten.logical_not.default, seen), 1)
    return mixed(c, c(aten.masked_fill.Scalar, scores(c, x), hidden, float("-inf")), x)


def lowered(c: Any, x: Any, seen: Any) -> Any:
    low = c(aten.mul.Tensor, c(aten.to.dtype, c(aten.logical_not.default, seen), torch.float32), -10000.0)
    return mixed(c, c(aten.add.Tensor, scores(c, x), c(aten.unsqueeze.default, low, 1)), x)


def fused(c: Any, x: Any, seen: Any) -> Any:
    heads = c(aten.unsqueeze.default, x, 1)
    mask = c(aten.unsqueeze.default, c(aten.unsqueeze.default, seen, 1), 1)
    told = c(aten.expand.default, mask, [-1, -1, TIME, -1])
    return c(
        aten.add.Tensor, x, c(aten.squeeze.dim, c(aten.scaled_dot_product_attention.default, *[heads] * 3, told), 1)
    )


def causal(c: Any, x: Any, seen: Any) -> Any:
    half = c(aten.tril.default, c(aten.ones.default, [TIME, TIME], dtype=torch.bool))
    both = c(aten.logical_and.default, half, c(aten.unsqueeze.default, seen, 1))
    hidden = c(aten.logical_not.default, both)
    return mixed(c, c(aten.masked_fill.Scalar, scores(c, x), hidden, -1e9), x)


def zeroed(c: Any, x: Any, seen: Any) -> Any:
    return c(aten.mul.Tensor, x, c(aten.unsqueeze.default, c(aten.to.dtype, seen, torch.float32), 2))


def averaged(c: Any, x: Any, seen: Any) -> Any:
    kept = zeroed(c, x, seen)
    count = c(aten.sum.dim_IntList, c(aten.to.dtype, seen, torch.float32), [1], True)
    mean = c(aten.div.Tensor, c(aten.sum.dim_IntList, kept, [1]), count)
    return c(aten.add.Tensor, x, c(aten.unsqueeze.default, mean, 1))


WAYS = {f.__name__: f for f in (filled, lowered, fused, causal, zeroed, averaged)}


def network(made: Made, mask: torch.Tensor) -> tuple[fx.GraphModule, Any]:
    """With a product before and behind what is made of x_BTD and a mask_BT, and the values of two rows."""

    def whole(c: Any, x: Any, m: Any, w: Any) -> Any:
        return c(aten.linear.default, made(c, c(aten.linear.default, x, w), m), w)

    inputs = (vectors(2, TIME, WIDTH), mask)
    graph_module = written(whole, *inputs, w=nn.Parameter(vectors(WIDTH, WIDTH)))
    if mask.is_floating_point():
        graph_module.graph.find_nodes(op="placeholder")[1].meta[MASK] = True
    return graph_module, record(graph_module, dict(zip(("x_0", "x_1"), inputs, strict=True)))


def found_in(graph_module: fx.GraphModule, values: Any) -> tuple[Padding, ...]:
    return find_padding(data_flow(graph_module.graph), values)


def check(made: Made, kind: str) -> tuple[Padding, ...]:
    """Whatever is found says which steps hold a token as the mask does."""
    dtype, token, hidden = KINDS[kind]
    graph_module, values = network(made, torch.full((2, TIME), token, dtype=dtype))
    found = found_in(graph_module, values)
    seen_BT = torch.rand(2, TIME, generator=torch.Generator().manual_seed(1)) < 0.5
    given = torch.where(seen_BT, token, hidden).to(dtype)
    again = record(graph_module, {"x_0": vectors(2, TIME, WIDTH), "x_1": given})
    held = {node.name: value for node, value in again.items()}
    for mask in found:
        assert torch.equal(mask.seen(held[mask.node]), seen_BT)
        assert mask.seen(mask.all_seen(held[mask.node])).all()
    names = list(held)
    assert [m.node for m in found] == sorted({m.node for m in found}, key=names.index)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_found_and_says_which_steps_hold_a_token(kind, way):
    assert len(check(lambda c, x, m: WAYS[way](c, x, shown(c, m, kind)), kind)) == 1


@pytest.mark.parametrize("kind", ["one, of floats", "additive"])
def test_a_mask_of_floats_that_is_added_itself_is_read_too(kind):
    def made(c: Any, x: Any, m: Any) -> Any:
        low = m if kind == "additive" else c(aten.mul.Tensor, c(aten.rsub.Scalar, m, 1.0), -10000.0)
        return mixed(c, c(aten.add.Tensor, scores(c, x), c(aten.unsqueeze.default, low, 1)), x)

    assert len(check(made, kind)) == 1


@pytest.mark.parametrize("kind", ["true", "one", "zero, of floats"])
def test_layers_share_a_mask_and_what_is_made_of_it_twice(kind):
    def made(c: Any, x: Any, m: Any) -> Any:
        seen = shown(c, m, kind)
        for _ in range(2):
            x = zeroed(c, filled(c, x, seen), seen)
        return lowered(c, x, c(aten.logical_not.default, c(aten.logical_not.default, seen)))

    assert check(made, kind)


# what of (B, T) changes hidden states and hides none
OTHERS: dict[str, tuple[Made, torch.Tensor]] = {
    "kinds of steps": (
        lambda c, x, m: c(aten.add.Tensor, x, c(aten.unsqueeze.default, c(aten.mul.Tensor, m, 0.5), 2)),
        torch.ones(2, TIME, dtype=torch.int64),
    ),
    "nothing": (lambda c, x, m: filled(c, x, c(aten.ones.default, [2, TIME], dtype=torch.bool)), torch.ones(2, TIME)),
    "queries that are hidden": (
        lambda c, x, m: mixed(
            c, c(aten.mul.Tensor, scores(c, x), c(aten.unsqueeze.default, m, 2)), x
        ),
        torch.ones(2, TIME, dtype=torch.int64),
    ),
    "a gain": (lambda c, x, m: c(aten.mul.Tensor, x, c(aten.unsqueeze.default, m, 2)), 0.5 + torch.rand(2, TIME)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_hides_no_step_is_no_mask(name):
    assert found_in(*network(*OTHERS[name])) == ()


def test_a_region_has_the_masks_that_its_own_nodes_read_and_make_none_of():
    graph_module, values = network(
        lambda c, x, m: c(aten.tanh.default, filled(c, c(aten.tanh.default, x), c(aten.ne.Scalar, m, 0))),
        torch.ones(2, TIME, dtype=torch.int64),
    )
    masks = found_in(graph_module, values)
    nodes = list(graph_module.graph.nodes)
    at = {n.name: n for n in nodes}
    first, second = at["tanh_default"], at["tanh_default_1"]

    def between(start: fx.Node, end: fx.Node) -> Region:
        side = data_flow(graph_module.graph).side
        inside = nodes[nodes.index(start) + 1 : nodes.index(end) + 1]
        return Region(entry=start, exit=end, nodes=tuple(n for n in inside if n not in side))

    assert padding_of(between(first, second), masks) == masks
    assert padding_of(between(at["x_0"], first), masks) == ()
    whole = Region(entry=at["x_0"], exit=second, nodes=tuple(nodes[nodes.index(at["w"]) + 1 : nodes.index(second) + 1]))
    assert padding_of(whole, masks) == (masks if masks[0].node == "x_1" else ())
    read = values_read(between(first, second))
    assert at["x_1"] in read
    assert at["x_0"] not in read
    assert at["x_1"] not in values_read(between(first, second), {masks[0].node, at["ne_scalar"].name})


def test_what_is_only_a_size_carries_no_values_into_a_region():
    def made(c: Any, x: Any, m: Any) -> Any:
        length = c(aten.sym_size.int, c(aten.exp.default, m), 1)
        return c(aten.mul.Tensor, x, length)

    graph_module, _ = network(made, torch.ones(2, TIME))
    at = {n.name: n for n in graph_module.graph.nodes}
    product = at["mul_tensor"]
    read = values_read(Region(entry=at["linear_default"], exit=product, nodes=(product,)))
    assert [n.name for n in read] == ["sym_size_int"]
