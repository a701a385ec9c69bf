from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.captured import traced
from tests.models import Calling, CallingTwo, vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.graph.text import text
from thesean.passes.write_out_for_onnx import FORMS, WriteOutForOnnx

EDGES = [0.0, 1e-8, -1e-8, 0.1, -0.5, 1.0, -3.0, 17.0, -17.0, 30.0, -88.0, 95.0, -104.0, 200.0, -1e4, 1e20, -1e30]
OF_ONE: dict[str, Callable[..., torch.Tensor]] = {
    "log_sigmoid": F.logsigmoid,
    "log of a sigmoid": lambda x: x.clamp_min(-80).sigmoid().log(),  # torch's own is -inf from -104 on
    "median": lambda x: x.median(-1).values,
    "median, kept": lambda x: x.median(0, keepdim=True).values,
}
OF_TWO: dict[str, Callable[..., torch.Tensor]] = {
    "logaddexp": torch.logaddexp,
    "logaddexp2": torch.logaddexp2,
    "atan2": torch.atan2,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "hypot": torch.hypot,
    "copysign": torch.copysign,
    "cross entropy": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none"),
    "cross entropy, weighed": lambda x, y: F.binary_cross_entropy_with_logits(
        x, y.sigmoid(), weight=torch.full_like(x, 2.0), pos_weight=torch.full_like(x, 3.0), reduction="sum"
    ),
    "mean cross entropy": lambda x, y: F.binary_cross_entropy_with_logits(x, (y > 0).float()),
}


def edges(count: int) -> list[torch.Tensor]:
    """Each with each."""
    return [x.contiguous() for x in torch.meshgrid(*[torch.tensor(EDGES)] * count, indexing="ij")]


def test_the_graph_before_and_after():
    graph_module = traced(Calling(F.logsigmoid), vectors(2, 3))
    assert text(graph_module.graph) == [
        "x = placeholder x",
        "log_sigmoid = aten.log_sigmoid.default(x)",
        "return (log_sigmoid,)",
    ]
    assert text(WriteOutForOnnx()(graph_module).graph_module.graph) == [
        "x = placeholder x",
        "neg = aten.neg.default(x)",
        "softplus = aten.softplus.default(neg)",
        "neg_1 = aten.neg.default(softplus)",
        "return (neg_1,)",
    ]


@pytest.mark.parametrize(("name", "count"), [*((n, 1) for n in OF_ONE), *((n, 2) for n in OF_TWO)])
def test_values_are_the_operators_at_the_edges_too(name: str, count: int):
    of, given = (OF_ONE | OF_TWO)[name], edges(2)[:count]
    module = Calling(of) if count == 1 else CallingTwo(of)
    graph_module = traced(module, *(torch.rand_like(x) for x in given))
    result = WriteOutForOnnx()(graph_module)
    assert result.modified
    assert not any(n.target in (*FORMS, torch.ops.aten.log.default) for n in result.graph_module.graph.nodes)
    torch.testing.assert_close(result.graph_module(*given), of(*given), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("dims", "places"), [(1, (4,)), (2, (3, 5)), (2, (7, 7)), (3, (1, 2, 3))])
def test_means_of_so_many_places_are_right_for_all_sizes(dims: int, places: tuple[int, ...]):
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    free = {"input": {0: "batch"} | {d: f"size_{d}" for d in range(2, 2 + dims)}}
    guide = capture(pool(places[0] if dims == 1 else places).eval(), vectors(2, 3, *[12] * dims), dynamic=free)
    result = WriteOutForOnnx()(guide.graph_module)
    assert result.modified
    for sizes in ((12, 12, 12), (9, 17, 5), (2, 1, 3), (33, 7, 14)):
        x = vectors(2, 3, *sizes[:dims])
        expected = pool(places[0] if dims == 1 else places)(x)
        torch.testing.assert_close(result.graph_module(x), expected)


def test_means_of_fixed_sizes_and_of_all_places_stay():
    for module, free in ((nn.AdaptiveAvgPool2d(3), {0: "batch"}), (nn.AdaptiveAvgPool2d(1), {0: "batch", 2: "height"})):
        guide = capture(module.eval(), vectors(2, 3, 12, 12), dynamic={"input": free})
        assert not WriteOutForOnnx()(guide.graph_module).modified


def test_what_torch_writes_rightly_stays():
    graph_module = traced(Calling(torch.sigmoid), vectors(2, 3))
    assert WriteOutForOnnx()(graph_module).reason == "torch's exporter writes all operators as they are"


@pytest.mark.parametrize("of", [torch.fmax, torch.fmin], ids=["fmax", "fmin"])
def test_a_number_is_chosen_where_the_other_is_none(of):
    a, b = torch.tensor([torch.nan, 1.0, torch.nan]), torch.tensor([2.0, torch.nan, torch.nan])
    found = WriteOutForOnnx()(traced(CallingTwo(of), a, b)).graph_module(a, b)
    torch.testing.assert_close(found, of(a, b), equal_nan=True)


def example() -> Example:
    return Example(WriteOutForOnnx(), traced(Calling(F.logsigmoid), vectors(2, 4)), (vectors(2, 4),))
