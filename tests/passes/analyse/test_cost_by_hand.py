"""Floating-point operations of one operator each, two for a multiplication that is added: read off shapes, and run.

B batch, T time, D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from tests.models import vectors
from tests.written import ends, written
from thesean.passes.analyse.cost import SymbolicSizes, flops_by_node
from thesean.passes.graph.signature import InputSpec, Signature

aten = torch.ops.aten

Made = Callable[..., Any]

CELL = [(12, 5), (12, 3), (12,), (12,)]  # an LSTM's of 3 hidden units over 5 features
GRU = [(9, 5), (9, 3), (9,), (9,)]

# what is made of values of these shapes, and by how many operations
FLOPS: dict[str, tuple[Made, list[tuple[int, ...]], int]] = {
    "linear": (lambda c, x, w: c(aten.linear.default, x, w), [(2, 3, 4), (5, 4)], 2 * 2 * 3 * 4 * 5),
    "linear with a bias": (lambda c, x, w, b: c(aten.linear.default, x, w, b), [(3, 4), (5, 4), (5,)], 2 * 3 * 4 * 5),
    "matmul": (lambda c, x, y: c(aten.matmul.default, x, y), [(2, 3, 4), (4, 5)], 2 * 2 * 3 * 4 * 5),
    "matmul of many": (lambda c, x, y: c(aten.matmul.default, x, y), [(7, 1, 3, 4), (2, 4, 5)], 2 * 7 * 2 * 3 * 4 * 5),
    "matmul with a vector": (lambda c, x, y: c(aten.matmul.default, x, y), [(2, 3, 4), (4,)], 2 * 2 * 3 * 4),
    "mm": (lambda c, x, y: c(aten.mm.default, x, y), [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
    "bmm": (lambda c, x, y: c(aten.bmm.default, x, y), [(2, 3, 4), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
    "mv": (lambda c, x, y: c(aten.mv.default, x, y), [(3, 4), (4,)], 2 * 3 * 4),
    "dot": (lambda c, x, y: c(aten.dot.default, x, y), [(4,), (4,)], 2 * 4),
    "addmm": (lambda c, b, x, y: c(aten.addmm.default, b, x, y), [(5,), (3, 4), (4, 5)], 2 * 3 * 4 * 5),
    "baddbmm": (
        lambda c, b, x, y: c(aten.baddbmm.default, b, x, y), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 2 * 2 * 3 * 4 * 5
    ),
    "addmv": (lambda c, b, x, y: c(aten.addmv.default, b, x, y), [(3,), (3, 4), (4,)], 2 * 3 * 4),
    "conv1d": (lambda c, x, w: c(aten.conv1d.default, x, w), [(2, 4, 9), (6, 4, 3)], 2 * (2 * 6 * 7) * 4 * 3),
    "conv1d in groups": (
        lambda c, x, w: c(aten.conv1d.default, x, w, None, [2], [1], [1], 2), [(2, 4, 9), (6, 2, 3)],
        2 * (2 * 6 * 5) * 2 * 3,
    ),
    "conv2d": (lambda c, x, w: c(aten.conv2d.default, x, w), [(2, 4, 5, 6), (3, 4, 2, 3)], 2 * (2 * 3 * 4 * 4) * 4 * 6),
    "conv3d": (
        lambda c, x, w: c(aten.conv3d.default, x, w), [(1, 2, 3, 4, 5), (3, 2, 2, 2, 2)], 2 * (3 * 2 * 3 * 4) * 2 * 8
    ),
    "conv_transpose1d": (
        lambda c, x, w: c(aten.conv_transpose1d.default, x, w, None, [2]), [(2, 4, 5), (4, 3, 2)],
        2 * (2 * 4 * 5) * 3 * 2,
    ),
    "conv_transpose2d": (
        lambda c, x, w: c(aten.conv_transpose2d.input, x, w), [(2, 4, 3, 3), (4, 3, 2, 2)], 2 * (2 * 4 * 9) * 3 * 4
    ),
    "an attention": (
        lambda c, q, k, v: c(aten.scaled_dot_product_attention.default, q, k, v),
        [(2, 3, 4, 5), (2, 3, 7, 5), (2, 3, 7, 6)], 2 * (2 * 3 * 4 * 7) * (5 + 6),
    ),
    "an LSTM": (
        lambda c, x, h, a, b, d, e: c(
            aten.lstm.input, x, [h, h], [a, b, d, e], True, 1, 0.0, False, False, True
        ),
        [(2, 7, 5), (1, 2, 3), *CELL], 2 * 2 * 7 * (12 * 5 + 12 * 3),
    ),
    "a GRU": (
        lambda c, x, h, a, b, d, e: c(aten.gru.input, x, h, [a, b, d, e], True, 1, 0.0, False, False, True),
        [(2, 7, 5), (1, 2, 3), *GRU], 2 * 2 * 7 * (9 * 5 + 9 * 3),
    ),
    "einsum": (lambda c, x, y: c(aten.einsum.default, "btd,de->bte", [x, y]), [(2, 3, 4), (4, 5)], 2 * 2 * 3 * 4 * 5),
    "a function": (lambda c, x: c(aten.tanh.default, x), [(2, 3)], 0),
    "a sum": (lambda c, x: c(aten.sum.default, x), [(2, 3)], 0),
    "a norm": (lambda c, x: c(aten.layer_norm.default, x, [3]), [(2, 3)], 0),
}  # fmt: skip


def case(name: str) -> tuple[fx.GraphModule, Signature, Any, int]:
    made, shapes, flops = FLOPS[name]
    graph_module = written(made, *(vectors(*shape) for shape in shapes))
    specs = (InputSpec(name=f"x_{at}", dtype=torch.float32, shape=shape) for at, shape in enumerate(shapes))
    return graph_module, Signature(inputs=tuple(specs)), ends(graph_module), flops


@pytest.mark.parametrize("name", FLOPS)
def test_operations_are_two_for_each_multiplication_that_is_added(name):
    graph_module, signature, end, flops = case(name)
    found = flops_by_node(graph_module, signature, {})
    assert found[end] == flops
    assert sum(found.values()) == flops
    assert all(isinstance(count, int) for count in found.values())


# what torch counts nothing of
UNCOUNTED = ("matmul with a vector", "mv", "dot", "addmv", "an LSTM", "a GRU")


@pytest.mark.parametrize("name", [n for n in FLOPS if n not in UNCOUNTED])
def test_a_graph_without_shapes_is_run_and_comes_to_the_same(name):
    graph_module, signature, end, flops = case(name)
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)
    assert flops_by_node(graph_module, signature, {})[end] == flops


def test_where_a_size_hangs_on_values_the_numbers_are_run():
    def made(c: Any, x: Any, w: Any) -> Any:
        kept = c(aten.index.Tensor, x, [c(aten.gt.Scalar, c(aten.select.int, x, 1, 0), 0)])
        return c(aten.mm.default, kept, w)

    graph_module = written(made, vectors(50, 4), vectors(4, 3))
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)
    shapes: list[tuple[int | str, ...]] = [("batch", 4), (4, 3)]
    specs = (InputSpec(name=f"x_{at}", dtype=torch.float32, shape=shape) for at, shape in enumerate(shapes))
    flops = flops_by_node(graph_module, Signature(inputs=tuple(specs)), {"batch": 50})[ends(graph_module)]
    assert 0 < flops < 2 * 50 * 4 * 3
    assert flops % (2 * 4 * 3) == 0


WRITTEN: dict[str, int] = {
    "time": 9, "2*time + batch": 20, "time - batch": 7, "time//2": 4, "-time": -9, "time % 4": 1, "batch**3": 8,
    "Max(time, 20)": 20, "Min(time, 20, batch)": 2, "Mod(time, 5)": 4, "PythonMod(time, 5)": 4, "FloorDiv(time, 2)": 4,
    "(time + 1)*(batch - 1)": 10, " time ": 9, "7": 7,
}  # fmt: skip


@pytest.mark.parametrize("written_so", WRITTEN)
def test_a_size_is_computed_as_torch_writes_it(written_so):
    assert SymbolicSizes({"time": 9, "batch": 2})[written_so] == WRITTEN[written_so]


@pytest.mark.parametrize(
    "written_so", ["time / 2", "~time", "not time", "time[0]", "1.5", "abs(time)", "time if 1 else 2", "["]
)
def test_what_torch_does_not_write_is_no_size(written_so):
    with pytest.raises(KeyError):
        SymbolicSizes({"time": 9})[written_so]
