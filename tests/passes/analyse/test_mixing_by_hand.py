"""Which outputs move with which inputs, and along which dimension places follow one another: one operator at a time.

B batch, T time, D width, C channels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import vectors
from tests.written import ends, written
from thesean.errors import PlanError
from thesean.passes.analyse.layout import is_channels_first
from thesean.passes.analyse.mixing import probe_mixing
from thesean.passes.analyse.regions import Region
from thesean.passes.graph.record import record

aten = torch.ops.aten
END = 2**63 - 1

Made = Callable[..., Any]


def region_of(made: Made, x: torch.Tensor, **held: torch.Tensor) -> tuple[Region, Any]:
    """All from x to what is made of it, and the values at x."""
    graph_module = written(made, x, **held)
    (entry,) = graph_module.graph.find_nodes(op="placeholder")
    nodes = tuple(n for n in graph_module.graph.nodes if n.op == "call_function")
    return Region(entry=entry, exit=ends(graph_module), nodes=nodes), record(graph_module, {"x_0": x})


def shifted(c: Any, x: Any, first: int, last: int, dim: int = 1) -> Any:
    amounts = [0, 0, first, last] if dim == 1 else [first, last, 0, 0]
    return c(aten.pad.default, x, amounts)


def attention(c: Any, x: Any, causal: bool) -> Any:
    return c(aten.scaled_dot_product_attention.default, x, x, x, None, 0.0, causal)


def last(c: Any, x: Any) -> Any:
    return c(aten.slice.Tensor, x, 1, -1, END)


def first(c: Any, x: Any) -> Any:
    return c(aten.slice.Tensor, x, 1, 0, 1)


MIXING: dict[str, tuple[Made, str]] = {
    "a function": (lambda c, x: c(aten.tanh.default, x), "none"),
    "a sum with itself": (lambda c, x: c(aten.add.Tensor, x, c(aten.sum.dim_IntList, x, [2], True)), "none"),
    "a running sum": (lambda c, x: c(aten.cumsum.default, x, 1), "causal"),
    "a softmax of the width": (lambda c, x: c(aten.softmax.int, x, 2), "none"),
    "a running sum from the back": (
        lambda c, x: c(aten.flip.default, c(aten.cumsum.default, c(aten.flip.default, x, [1]), 1), [1]),
        "bidirectional",
    ),
    "a flip": (lambda c, x: c(aten.flip.default, x, [1]), "bidirectional"),
    "a mean": (lambda c, x: c(aten.sub.Tensor, x, c(aten.mean.dim, x, [1], True)), "bidirectional"),
    "the first beside all": (lambda c, x: c(aten.add.Tensor, x, first(c, x)), "causal"),
    "the last beside all": (lambda c, x: c(aten.add.Tensor, x, last(c, x)), "bidirectional"),
    "the last alone": (lambda c, x: c(aten.expand_as.default, last(c, x), x), "bidirectional"),
    "the step before": (lambda c, x: c(aten.add.Tensor, x, shifted(c, x, 1, -1)), "causal"),
    "the step before alone": (lambda c, x: shifted(c, x, 1, -1), "causal"),
    "the step behind": (lambda c, x: c(aten.add.Tensor, x, shifted(c, x, -1, 1)), "bidirectional"),
    "an attention": (lambda c, x: attention(c, x, causal=False), "bidirectional"),
    "a causal one": (lambda c, x: attention(c, x, causal=True), "causal"),
    "a vector of all steps": (lambda c, x: c(aten.mean.dim, x, [1]), "none"),
    "every second step": (lambda c, x: c(aten.slice.Tensor, x, 1, 0, END, 2), "bidirectional"),
    "an image of it": (lambda c, x: c(aten.unsqueeze.default, x, 1), "bidirectional"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("scale", [1e-5, 0.0, 1.0])
def test_what_moves_with_a_token_tells_how_tokens_are_mixed(name, scale):
    made, mixing = MIXING[name]
    assert probe_mixing(*region_of(made, scale * vectors(2, 5, 4))) == mixing


@pytest.mark.parametrize("name", MIXING)
def test_three_tokens_tell_it(name):
    made, mixing = MIXING[name]
    assert probe_mixing(*region_of(made, vectors(2, 3, 4))) == mixing


def test_rounding_is_no_mixing_and_little_of_it_is():
    def part(size: float) -> Made:
        return lambda c, x: c(aten.add.Tensor, x, c(aten.mul.Tensor, c(aten.cumsum.default, x, 1), size))

    assert probe_mixing(*region_of(part(1e-8), vectors(2, 5, 4))) == "none"
    assert probe_mixing(*region_of(part(1e-3), vectors(2, 5, 4))) == "causal"


# of two examples of this shape
MIXES_EXAMPLES: dict[str, tuple[Made, tuple[int, ...]]] = {
    "a mean over rows": (lambda c, x: c(aten.sub.Tensor, x, c(aten.mean.dim, x, [0], True)), (5, 4)),
    "a softmax over images": (lambda c, x: c(aten.softmax.int, x, 0), (3, 4, 4)),
    "the first row beside all": (lambda c, x: c(aten.add.Tensor, x, c(aten.slice.Tensor, x, 0, 0, 1)), (5, 4)),
    "vectors": (lambda c, x: c(aten.softmax.int, x, 0), (4,)),
    "vectors' sums": (lambda c, x: c(aten.cumsum.default, x, 0), (4,)),
    "a running sum over rows": (lambda c, x: c(aten.cumsum.default, x, 0), (5, 4)),
}


@pytest.mark.parametrize("name", MIXES_EXAMPLES)
def test_one_example_that_changes_anothers_output_is_refused_by_name(name):
    made, shape = MIXES_EXAMPLES[name]
    region, values = region_of(made, vectors(2, *shape))
    with pytest.raises(PlanError, match=f"^what ends in {region.exit.name}: one example of a batch changes"):
        probe_mixing(region, values)


def test_vectors_and_images_by_themselves_are_not_refused():
    for shape, mixing in (((4,), "none"), ((3, 4, 4), "bidirectional")):
        assert probe_mixing(*region_of(lambda c, x: c(aten.softmax.int, x, 1), vectors(2, *shape))) == mixing


# what is made of x_BCT, by a convolution of 6 channels or without one, and whether it came channels first
KERNEL = nn.Parameter(vectors(6, 6, 3))
OTHER = nn.Parameter(vectors(6, 6))


def other_way(c: Any, x: Any) -> Any:
    return c(aten.transpose.int, x, 1, 2)


def convolution(c: Any, x: Any, k: Any) -> Any:
    return c(aten.conv1d.default, x, k, None, [1], [1])


LAYOUTS: dict[str, tuple[Made, bool]] = {
    "a convolution": (lambda c, x, k, w: convolution(c, x, k), True),
    "a convolution of the other way": (lambda c, x, k, w: other_way(c, convolution(c, other_way(c, x), k)), False),
    "a permutation before": (
        lambda c, x, k, w: convolution(c, c(aten.permute.default, x, [0, 2, 1]), k), False
    ),
    "one from the back": (lambda c, x, k, w: convolution(c, c(aten.transpose.int, x, -1, -2), k), False),
    "turned twice": (lambda c, x, k, w: convolution(c, other_way(c, other_way(c, x)), k), True),
    "turned twice, from the back": (
        lambda c, x, k, w: convolution(c, c(aten.transpose.int, c(aten.transpose.int, x, -1, -2), -2, -1), k), True
    ),
    "turned twice, by permutations": (
        lambda c, x, k, w: convolution(
            c, c(aten.permute.default, c(aten.permute.default, x, [0, 2, 1]), [-3, -1, -2]), k
        ),
        True,
    ),
    "rows turned with channels, and back": (
        lambda c, x, k, w: convolution(c, c(aten.transpose.int, c(aten.transpose.int, x, 0, 1), 0, 1), k), False
    ),
    "a function before": (lambda c, x, k, w: convolution(c, c(aten.tanh.default, x), k), True),
    "a function before, of the other way": (
        lambda c, x, k, w: convolution(c, c(aten.tanh.default, other_way(c, x)), k), False
    ),
    "a norm over channels": (lambda c, x, k, w: c(aten.group_norm.default, x, 2), True),
    "a convolution behind what turns rows": (
        lambda c, x, k, w: c(aten.transpose.int, convolution(c, c(aten.roll.default, x, [1], [0]), k), 0, 2), True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_convolution_reads_is_channels_first_however_it_was_turned(name):
    made, channels_first = LAYOUTS[name]
    region, _ = region_of(made, vectors(6, 6, 6), k=KERNEL, w=OTHER)
    assert is_channels_first(region) == channels_first


def middle(c: Any, entry: Any) -> tuple[Any, Any]:
    """A region that says nothing itself."""
    return entry, c(aten.exp.default, entry)


def before(c: Any, entry: Any, k: Any) -> tuple[Any, Any]:
    return middle(c, c(aten.tanh.default, entry))


def behind(c: Any, x: Any, then: Callable[[Any], Any]) -> tuple[Any, ...]:
    entry, end = middle(c, c(aten.tanh.default, x))
    return entry, end, then(c(aten.neg.default, end))


def cell(c: Any, x: Any, w: Any) -> Any:
    start = c(aten.zeros.default, [1, 6, 6])
    return c(aten.rnn_tanh.input, x, start, [w, w], False, 1, 0.0, False, False, True)


# of a region's entry, its exit and what else is made of x_BCT, and whether the region's entry is channels first
ALONG: dict[str, tuple[Made, bool]] = {
    "a convolution before": (lambda c, x, k, w: before(c, convolution(c, x, k), k), True),
    "a convolution before, turned behind it": (
        lambda c, x, k, w: before(c, other_way(c, convolution(c, x, k)), k), False
    ),
    "a convolution that makes it": (lambda c, x, k, w: middle(c, convolution(c, x, k)), True),
    "a convolution behind": (lambda c, x, k, w: behind(c, x, lambda y: convolution(c, y, k)), True),
    "a convolution behind, turned before it": (
        lambda c, x, k, w: behind(c, x, lambda y: convolution(c, other_way(c, y), k)), False
    ),
    "a convolution behind, turned twice": (
        lambda c, x, k, w: behind(c, x, lambda y: convolution(c, other_way(c, other_way(c, y)), k)),
        True,
    ),
    "a recurrence behind": (
        lambda c, x, k, w: (*behind(c, x, lambda y: cell(c, y, w)), convolution(c, other_way(c, x), k)), False
    ),
    "a recurrence behind, turned before it": (
        lambda c, x, k, w: (*behind(c, x, lambda y: cell(c, other_way(c, y), w)), convolution(c, x, k)), True
    ),
    "a sum with what a convolution makes": (
        lambda c, x, k, w: behind(c, x, lambda y: c(aten.add.Tensor, y, convolution(c, x, k))), True
    ),
    "a sum with what a convolution makes of another layout": (
        lambda c, x, k, w: behind(
            c, x, lambda y: c(aten.add.Tensor, y, other_way(c, convolution(c, other_way(c, x), k)))
        ),
        False,
    ),
    "a matrix between": (
        lambda c, x, k, w: behind(c, x, lambda y: convolution(c, c(aten.linear.default, y, w), k)), False
    ),
    "a view between": (
        lambda c, x, k, w: behind(c, x, lambda y: convolution(c, c(aten.view.default, y, [6, 6, 6]), k)), False
    ),
    "rows turned between": (
        lambda c, x, k, w: behind(c, x, lambda y: convolution(c, c(aten.transpose.int, y, 0, 1), k)), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONG)
def test_where_a_region_says_nothing_the_nearest_of_what_it_is_cut_from_does(name):
    graph_module = written(lambda c, x, k, w: [*ALONG[name][0](c, x, k, w)], vectors(6, 6, 6), k=KERNEL, w=OTHER)
    entry, end, *_ = ends(graph_module)
    assert is_channels_first(Region(entry=entry, exit=end, nodes=(end,))) == ALONG[name][1]


def running_sum(dim: int) -> Made:
    return lambda c, x, w: c(aten.cumsum.default, x, dim)


NUMBERS: dict[str, tuple[Made, bool]] = {
    "its neighbour behind": (lambda c, x, w: c(aten.add.Tensor, x, shifted(c, x, 1, -1, 2)), True),
    "its neighbour before": (lambda c, x, w: c(aten.add.Tensor, x, shifted(c, x, -1, 1, 2)), True),
    "its neighbour of the channels": (lambda c, x, w: c(aten.add.Tensor, x, shifted(c, x, 1, -1, 1)), False),
    "the one beside alone": (lambda c, x, w: shifted(c, x, 1, -1, 2), True),
    "neighbours of both": (lambda c, x, w: shifted(c, c(aten.add.Tensor, x, shifted(c, x, 1, -1, 2)), 1, -1, 1), False),
    "all behind": (running_sum(2), True),
    "all behind among channels": (running_sum(1), False),
    "all before": (
        lambda c, x, w: c(aten.flip.default, c(aten.cumsum.default, c(aten.flip.default, x, [2]), 2), [2]), True
    ),
    "all of both": (lambda c, x, w: c(aten.cumsum.default, c(aten.cumsum.default, x, 2), 1), False),
    "a function": (lambda c, x, w: c(aten.tanh.default, x), False),
    "all channels, step by step": (lambda c, x, w: c(aten.matmul.default, w, x), False),
    "all steps": (lambda c, x, w: c(aten.softmax.int, x, 2), False),
    "all channels and neighbours": (
        lambda c, x, w: c(aten.matmul.default, w, c(aten.add.Tensor, x, shifted(c, x, 1, -1, 2))), True
    ),
    "all behind, and one before": (
        lambda c, x, w: c(aten.add.Tensor, c(aten.cumsum.default, x, 2), shifted(c, x, -1, 1, 2)), True
    ),
    "two apart": (lambda c, x, w: c(aten.add.Tensor, shifted(c, x, 1, -1, 2), shifted(c, x, -1, 1, 2)), False),
    "a flip of all before": (lambda c, x, w: c(aten.flip.default, c(aten.cumsum.default, x, 2), [2]), False),
    "backwards": (lambda c, x, w: c(aten.flip.default, x, [2]), False),
    "every second one": (lambda c, x, w: c(aten.add.Tensor, x, shifted(c, x, 2, -2, 2)), False),
    "fewer": (lambda c, x, w: c(aten.slice.Tensor, c(aten.cumsum.default, x, 2), 2, 1, END), False),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_where_no_operator_tells_places_that_follow_one_another_are_steps(name):
    made, channels_first = NUMBERS[name]
    region, values = region_of(made, vectors(2, 6, 7), w=OTHER)
    assert is_channels_first(region, values) == channels_first
    assert is_channels_first(region, dict(values)) == channels_first
    assert not is_channels_first(region)
    turned = written(lambda c, x, w: other_way(c, made(c, other_way(c, x), w)), vectors(2, 7, 6), w=OTHER)
    (entry,) = turned.graph.find_nodes(op="placeholder")
    nodes = tuple(n for n in turned.graph.nodes if n.op == "call_function")
    behind = Region(entry=entry, exit=ends(turned), nodes=nodes)
    assert not (channels_first and is_channels_first(behind, record(turned, {"x_0": vectors(2, 7, 6)})))


def test_fewer_than_four_places_and_other_ranks_tell_nothing():
    few: list[tuple[Made, tuple[int, ...]]] = [
        *((lambda c, x: c(aten.cumsum.default, x, -1), shape) for shape in ((2, 6, 3), (2, 6), (2, 6, 5, 5))),
        (lambda c, x: c(aten.sum.dim_IntList, x, [2]), (2, 6, 7)),
    ]
    for made, shape in few:
        region, values = region_of(made, vectors(*shape))
        assert not is_channels_first(region, values)
    region, values = region_of(lambda c, x: c(aten.cumsum.default, x, -1), vectors(2, 6, 4))
    assert is_channels_first(region, values)
