"""B batch, D width"""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.models import vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.cast_floats import CastFloats, cast_signature, cast_tensor, dtypes_for
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

aten = torch.ops.aten


def masked(dtype: torch.dtype) -> fx.GraphModule:
    """x -> x W' with what is negative far below, computed in one precision and given in float32."""
    graph, root = fx.Graph(), nn.Module()
    root.weight = nn.Parameter(torch.eye(3, dtype=dtype))
    x = graph.placeholder("x")
    product = graph.call_function(aten.linear.default, (x, graph.get_attr("weight")))
    negative = graph.call_function(aten.lt.Scalar, (product, 0.0))
    low = graph.call_function(aten.masked_fill.Scalar, (product, negative, float(torch.finfo(dtype).min)))
    cast = graph.call_function(aten._to_copy.default, (low,), {"dtype": dtype})
    graph.output((graph.call_function(aten._to_copy.default, (cast,), {"dtype": FP32}),))
    return fx.GraphModule(root, graph)


def test_weights_and_casts_of_one_precision_become_another_and_the_rest_stays():
    graph_module = masked(BF16)
    before = text(graph_module.graph)
    assert before[-3:-1] == [
        "_to_copy_default = aten._to_copy.default(masked_fill_scalar, dtype=torch.bfloat16)",
        "_to_copy_default_1 = aten._to_copy.default(_to_copy_default, dtype=torch.float32)",
    ]
    result = CastFloats({BF16: FP16})(graph_module)
    after = text(graph_module.graph)
    assert result.modified
    assert after[-3:-1] == [before[-3].replace("bfloat16", "float16"), before[-2]]
    assert graph_module.weight.dtype == FP16
    (y,) = graph_module(torch.tensor([[-1.0, 0.0, 2.0]], dtype=FP16))
    assert y.tolist() == [[torch.finfo(FP16).min, 0.0, 2.0]]  # the largest that the new precision has


def test_a_network_without_weights_is_of_the_precision_of_its_inputs():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, 3, dtype=BF16)
    graph.output((graph.call_function(aten.neg.default, (x,)),))
    result = CastFloats({BF16: FP32})(fx.GraphModule(nn.Module(), graph))
    assert result.modified


@pytest.mark.parametrize("dtypes", [{}, {BF16: FP32}])
def test_a_network_without_that_precision_is_left_alone(dtypes):
    result = CastFloats(dtypes)(clone(captured.mlp().graph_module))
    assert not result.modified
    assert result.reason == ("nothing in it is bfloat16" if dtypes else "nothing in it is another precision")


def test_a_cast_tensor_keeps_infinities_and_no_finite_number_becomes_one():
    x = torch.tensor([1e6, -math.inf, 1.5])
    assert cast_tensor(x, {FP32: FP16}).tolist() == [torch.finfo(FP16).max, -math.inf, 1.5]
    assert cast_tensor(x, {BF16: FP16}) is x


@pytest.mark.parametrize(
    ("own", "wanted", "expected"),
    [
        (FP32, None, {}),
        (BF16, None, {BF16: FP32, FP16: FP32}),
        (FP64, None, {FP64: FP32, BF16: FP32, FP16: FP32}),
        (FP32, FP16, {FP32: FP16, BF16: FP16}),
        (BF16, FP16, {BF16: FP16}),  # what it computes in float32, it does there too
    ],
)
def test_what_a_file_needs_cast_is_read_off_weights_and_inputs(own, wanted, expected):
    guide = capture(models.mlp().to(own), vectors(2, 8).to(own))
    dtypes = dtypes_for(guide.graph_module, guide.signature, wanted)
    assert dtypes == expected
    (spec,) = cast_signature(guide.signature, dtypes).inputs
    assert spec.dtype == expected.get(own, own)
    assert spec.example is not None
    assert spec.example.dtype == spec.dtype


def example() -> Example:
    guide = capture(models.mlp().to(FP64), vectors(2, 8).to(FP64))
    # what it takes follows its weights, so that outputs for one input can't be compared
    return Example(CastFloats({FP64: FP32}), clone(guide.graph_module), (vectors(2, 8),), same_outputs=False)


class Turning(nn.Module):
    """x_BD with its neighbours turned as complex numbers, which are given away too."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pairs = torch.view_as_complex((2 * x).unflatten(-1, (-1, 2)))
        turned = pairs * torch.polar(torch.ones(2), torch.tensor([0.5, 1.5]))
        return {
            "parts": torch.view_as_real(turned).flatten(-2) * x,
            "length": turned.abs(),
            "real": torch.fft.hfft(x, n=4),
        }


def test_complex_numbers_are_of_float32_where_the_rest_is_of_half_precision():
    guide = capture(Turning(), vectors(3, 4))
    x = guide.example["x"]
    wanted = guide.graph_module(x)
    cast = CastFloats({FP32: FP16})(clone(guide.graph_module)).graph_module
    seen = []

    class Look(fx.Interpreter):
        def run_node(self, n):
            seen.append(super().run_node(n))
            return seen[-1]

    found = Look(cast).run(x.half())
    assert {t.dtype for t in seen if isinstance(t, torch.Tensor) and t.is_complex()} == {torch.complex64}
    for name, value in found.items():
        assert value.dtype == FP16
        torch.testing.assert_close(value.float(), wanted[name], rtol=1e-2, atol=1e-2)
