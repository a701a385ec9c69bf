from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from thesean.errors import ArtifactError
from thesean.passes.graph.fitting import Fitting
from thesean.passes.graph.shapes import Shapes
from thesean.passes.graph.signature import InputSpec, Signature

aten = torch.ops.aten
X = InputSpec(name="x", dtype=torch.float32, shape=("batch", "time", 4))


def fitted(build: Any, limit: int = 2**30) -> int:
    """The peak in bytes of what `build(graph, x)` adds to a graph, at 2 x 6 x 4 numbers."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    fitting = Fitting(module=nn.Module(), signature=Signature(inputs=(X,)), sizes={"batch": 2, "time": 6}, limit=limit)
    return fitting.run(graph)


def middle(graph: fx.Graph, x: fx.Node, reader: Any = None) -> fx.Node:
    """DeBERTa's way: a size that stands in a tensor for a while, and then says where a slice begins."""
    time = graph.call_function(aten.sym_size.int, (x, 1))
    scalar = graph.call_function(aten.scalar_tensor.default, (time,), {"dtype": torch.int64})
    begin = graph.call_function(aten.item.default, (graph.call_function(aten.rsub.Scalar, (scalar, 8)),))
    return (reader or (lambda n: graph.call_function(aten.slice.Tensor, (x, 1, n, 100))))(begin)


def test_a_number_of_sizes_may_bound_a_slice_and_make_no_size():
    assert fitted(middle) == 2 * 6 * 4 * 4 + 0 * 8 + 16  # the input, and two whole numbers
    with pytest.raises(ArtifactError, match="a size depends on values"):
        fitted(lambda graph, x: middle(graph, x, lambda n: graph.call_function(aten.ones.default, ([n],))))


def test_an_item_is_one_number_and_a_factor_where_it_is_of_values():
    def scaled(graph: fx.Graph, x: fx.Node) -> fx.Node:
        whole = graph.call_function(aten.sum.dim_IntList, (x, [0, 1, 2]))
        return graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.item.default, (whole,))))

    assert fitted(scaled) == 2 * 2 * 6 * 4 * 4
    with pytest.raises(ArtifactError, match="item is for one number"):
        fitted(lambda graph, x: graph.call_function(aten.item.default, (x,)))


def test_memory_is_counted_as_long_as_it_is_read_and_views_have_none():
    size = 2 * 6 * 4 * 4

    def chain(graph: fx.Graph, x: fx.Node, length: int = 5) -> fx.Node:
        for _ in range(length):
            x = graph.call_function(aten.transpose.int, (graph.call_function(aten.exp.default, (x,)), 1, 2))
        return x

    assert fitted(chain) == 2 * size
    assert (
        fitted(lambda graph, x: graph.call_function(aten.cat.default, ([chain(graph, x, 1), chain(graph, x, 3)],)))
        == 4 * size
    )
    with pytest.raises(ArtifactError, match=r"takes 192 bytes; at most 100 are allowed"):
        fitted(chain, limit=100)


@pytest.mark.parametrize("value", [torch.float32, slice(1)])
def test_an_output_holds_tensors_and_numbers(value):
    with pytest.raises(ArtifactError, match="an output holds"):
        fitted(lambda graph, x: (x, value))


CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.cat.default, ([torch.ones(2, 3), torch.ones(0), torch.ones(5, 3, dtype=torch.int64)],)),
    (aten.cat.default, ([torch.ones(2, 3), torch.ones(2, 1)], -1)),
    (aten.cat.default, ([torch.ones(2, 3), torch.ones(3, 2)],)),
    (aten.cat.default, ([torch.ones(0), torch.ones(0)],)),
    (aten.cat.default, ([torch.ones(2, 3), torch.ones(2, 3)], 2)),
    (aten.cat.default, ([torch.ones(2, 3), torch.ones(2, 3)], -3)),
    (aten.cat.default, ([torch.ones(2, 3), torch.ones(3)],)),
    (aten.stack.default, ([torch.ones(2, 3), torch.ones(2, 3)], -1)),
    (aten.stack.default, ([torch.ones(2, 3), torch.ones(2, 4)],)),
    (aten.addmm.default, (torch.ones(3), torch.ones(2, 4), torch.ones(4, 3))),
    (aten.addmm.default, (torch.ones(2), torch.ones(2, 4), torch.ones(4, 3))),
    (aten.addmm.default, (torch.ones(3), torch.ones(2, 4), torch.ones(4, 3, dtype=torch.int64))),
    (aten.addmm.default, (torch.ones(3), torch.ones(1, 2, 4), torch.ones(4, 3))),
    (aten.addmm.default, (torch.ones(3), torch.ones(2, 5), torch.ones(4, 3))),
    (aten.native_layer_norm.default, (torch.ones(2, 3), [3], torch.ones(3), None, 1e-5)),
    (aten.native_layer_norm.default, (torch.ones(2, 3), [2, 3], None, torch.ones(2, 3), 1e-5)),
    (aten.native_layer_norm.default, (torch.ones(2, 3), [], None, None, 1e-5)),
    (aten.native_layer_norm.default, (torch.ones(2, 3), [1, 2, 3], None, None, 1e-5)),
    (aten.native_layer_norm.default, (torch.ones(2, 3), [4], None, None, 1e-5)),
    (aten.native_layer_norm.default, (torch.ones(2, 3), [3], torch.ones(2), None, 1e-5)),
    (aten.native_group_norm.default, (torch.ones(2, 4, 5), torch.ones(4), None, 2, 4, 5, 2, 1e-5)),
    (aten.native_group_norm.default, (torch.ones(2, 4, 5), torch.ones(4), None, 2, 4, 5, 3, 1e-5)),
    (aten.native_batch_norm.default, (torch.ones(2, 3), torch.ones(4), None, None, None, True, 0.1, 1e-5)),
    (aten.native_group_norm.default, (torch.ones(2, 4, 5), torch.ones(3), None, 2, 4, 5, 2, 1e-5)),
    (aten.native_batch_norm.default, (torch.ones(2, 3), torch.ones(3), None, None, None, True, 0.1, 1e-5)),
    (aten.native_batch_norm.default, (torch.ones(2, 3), None, None, *[torch.ones(3)] * 2, False, 0.1, 1e-5)),
    (aten.native_batch_norm.default, (torch.ones(3), torch.ones(3), None, None, None, True, 0.1, 1e-5)),
    (aten.cumsum.default, (torch.ones(()), 0)),
    (aten.cumsum.default, (torch.ones(2, 3, dtype=torch.bool), 1)),
    (aten.cumsum.default, (torch.ones(2, 3), 2)),
    (aten.mean.dim, (torch.ones(2, 3), [-1], True)),
    (aten.mean.dim, (torch.ones(2, 3, dtype=torch.int64), [0])),
    (aten.sum.dim_IntList, (torch.ones(2, 3, dtype=torch.int64), None)),
    (aten.linalg_vector_norm.default, (torch.ones(2, 3), 2, [1], True)),
    (aten.mm.default, (torch.ones(2, 3), torch.ones(3, 4))),
    (aten.mm.default, (torch.ones(2, 3), torch.ones(2, 4))),
    (aten.mm.default, (torch.ones(1, 2, 3), torch.ones(1, 3, 4))),
    (aten.mm.default, (torch.ones(1, 2, 3), torch.ones(3, 4))),
    (aten.bmm.default, (torch.ones(5, 2, 3), torch.ones(5, 3, 4))),
    (aten.bmm.default, (torch.ones(5, 2, 3), torch.ones(1, 3, 4))),
    (aten.bmm.default, (torch.ones(5, 2, 3), torch.ones(5, 3, 4, dtype=torch.float16))),
    (aten.repeat.default, (torch.ones(2, 3), [4, 1, 2])),
    (aten.repeat.default, (torch.ones(2, 3), [4])),
    (aten.embedding.default, (torch.ones(2, 3), torch.ones(4, 5, dtype=torch.int64))),
    (aten.embedding.default, (torch.ones(2, 3), torch.ones(4, 5))),
    (aten.embedding.default, (torch.ones(3), torch.ones(4, 5, dtype=torch.int64))),
    (aten.flip.default, (torch.ones(2, 3), [-1])),
    (aten.flip.default, (torch.ones(2, 3), [2])),
    (aten._softmax.default, (torch.ones(2, 3), 1, False)),
    (aten._softmax.default, (torch.ones(2, 3), 2, False)),
    (aten.amax.default, (torch.ones(2, 3), [1])),
    (aten.amax.default, (torch.ones(2, 3),)),
    (aten.roll.default, (torch.ones(2, 3), [1], [0])),
    (aten.add.Tensor, (torch.ones(2, 1), torch.ones(3, dtype=torch.int64))),
    (aten.add.Tensor, (torch.ones(2, 2), torch.ones(3))),
    (aten.ge.Scalar, (torch.ones(2, 2), 1)),
    (aten.pow.Tensor_Scalar, (torch.ones(2, dtype=torch.int64), 0.5)),
    (aten.where.ScalarOther, (torch.ones(2, 1, dtype=torch.bool), torch.ones(3, dtype=torch.float16), 1.0)),
    (aten.bitwise_not.default, (torch.ones(2),)),
]


def described(call: Any, args: Any) -> Any:
    """Shape and dtype of a call's first output, "refused" where it doesn't fit."""
    try:
        found = call(*args)
    except (IndexError, RuntimeError, NotImplementedError):
        return "refused"
    first = found[0] if isinstance(found, tuple) else found
    return tuple(first.shape), first.dtype


@pytest.mark.parametrize(("call", "args"), CALLS)
def test_shapes_are_those_that_the_operators_give(call, args):
    on_meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
    with Shapes():
        assert described(call, on_meta) == described(call, args)


@pytest.mark.parametrize(("call", "sizes"), [(aten.eye.default, (3,)), (aten.eye.m, (2, 3)), (aten.eye.m, (3, 0))])
def test_an_identity_is_as_large_as_torchs(call, sizes):
    with Shapes():
        found = described(lambda *n: call(*n, device=torch.device("meta"), dtype=torch.float64), sizes)
    assert found == described(lambda *n: call(*n, dtype=torch.float64), sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_a_range_is_of_the_dtype_that_is_asked_for(dtype):
    with Shapes():
        found = aten.arange.start(0, 2.5, dtype=dtype, device=torch.device("meta"))
    assert (found.dtype, found.shape) == (dtype, (3,))


@pytest.mark.parametrize(
    "numbers", [(5,), (0,), (2, 7), (7, 2), (0.0, 2.5), (-3,), (0, 7, 2), (7, 0, -3), (0, 1, 0), (0, 1, -1)]
)
def test_a_range_is_as_long_as_torchs(numbers):
    call = [aten.arange.default, aten.arange.start, aten.arange.start_step][len(numbers) - 1]
    with Shapes():
        found = described(lambda *n: call(*n, device=torch.device("meta")), numbers)
    assert found == described(call, numbers)


class Swells(nn.Module):
    """Gives as much as it gets, and holds more on the way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 1000, 1)[:, : x.shape[1]].clone()


def test_what_a_module_holds_on_the_way_is_bounded_as_well():
    graph = fx.Graph()
    graph.output(graph.call_module("swells", (graph.placeholder("x"),)))
    root = nn.Module()
    root.add_module("swells", Swells())
    settings: dict[str, Any] = {"signature": Signature(inputs=(X,)), "sizes": {"batch": 2, "time": 6}}
    kinds = {"swells": "swells"}
    assert Fitting(module=root, limit=2**20, kinds=kinds, **settings).run(graph) == 1001 * 2 * 6 * 4 * 4
    with pytest.raises(ArtifactError, match=r"node swells .* takes 192,000 bytes; at most 100,000 are allowed"):
        Fitting(module=root, limit=100_000, kinds=kinds, **settings).run(graph)
