from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import fx

from tests.models import Calling, vectors
from tests.passes.contract import Example
from thesean.deploy.encoder_decoder import export_network
from thesean.passes.capture.capture import capture
from thesean.passes.graph.graph_json import dump, load
from thesean.passes.graph.text import text
from thesean.passes.write_out_sizes import WriteOutSizes


def of_sizes(function: Callable[..., torch.Tensor]) -> fx.GraphModule:
    """A small graph before any pass, whose sizes are free."""
    free = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(Calling(function), (vectors(4, 7),), dynamic_shapes=free, strict=False)
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * x.shape[1] ** -0.5 + math.ceil(x.shape[1] / 2)


def lines(graph_module: fx.GraphModule) -> list[str]:
    """What is called, by its name alone."""
    called = [line.split(" = ")[-1] for line in text(graph_module.graph)]
    return [re.sub(r"<(built-in )?function (\w+)( at \w+)?>?", r"\2", line) for line in called]


def test_the_graph_before_and_after():
    graph_module = of_sizes(scaled)
    assert lines(graph_module)[1:-1] == [
        "aten.sym_size.int(x, 1)",
        "sym_float(sym_size_int_2)",
        "pow(sym_float, -0.5)",
        "aten.mul.Tensor(x, pow_1)",
        "truediv(sym_size_int_2, 2)",
        "ceil(truediv)",
        "aten.add.Tensor(mul, ceil)",
    ]
    assert lines(WriteOutSizes()(graph_module).graph_module)[1:-1] == [
        "aten.sym_size.int(x, 1)",
        "aten.scalar_tensor.default(sym_size_int_2, dtype=torch.float32)",
        "aten.scalar_tensor.default(-0.5, dtype=torch.float32)",
        "aten.pow.Tensor_Tensor(scalar_tensor_default, scalar_tensor_default_1)",
        "aten.mul.Tensor(x, pow_tensor_tensor)",
        "add(sym_size_int_2, 1)",
        "floordiv(add_1, 2)",
        "aten.add.Tensor(mul, floordiv)",
    ]


def whole(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    ends = x[:, : math.floor(n / 2)].sum() + x[:, : math.trunc(n / 3)].sum() + x[:, : (n >> 1)].sum()
    return x * (abs(3 - n) + (n << 1) + (n & 3) + (n & 0) + math.ceil(n / 4)) / n**3 + ends


def fractions(x: torch.Tensor) -> torch.Tensor:
    root, small = x.shape[1] ** 0.5, math.pow(0.5, x.shape[0])
    hidden = x.masked_fill(x > root / 2, -root) * (2 * small + 1) - small
    return (root - hidden) / torch.sym_sqrt(x.shape[0]) + root / (x.abs() + 1)


@pytest.mark.parametrize("function", [scaled, whole, fractions])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_written_out_can_be_saved_and_holds_at_other_sizes(function, dtype):
    found = capture(Calling(function), vectors(4, 7, 6).to(dtype))
    assert found.signature.inputs[0].shape == ("batch", "time", 6)
    load(dump(found.graph_module.graph))
    for sizes in ((1, 8), (3, 300)):
        x = vectors(*sizes, 6).to(dtype)
        assert found.graph_module(x).dtype == dtype
        torch.testing.assert_close(found.graph_module(x), function(x))


@pytest.mark.parametrize("function", [whole, fractions])
def test_a_file_computes_with_sizes_as_torch_does(function, tmp_path):
    found = capture(Calling(function), vectors(4, 7, 6))
    assert export_network(found.graph_module, found.signature, tmp_path / "m.onnx").checks


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * max(x.shape[1] // 2, 3), "all that is done with sizes can be saved"),
        (lambda x: x[:, : round(x.shape[1] / 2)], "no other form is known"),
        (lambda x: x.new_full((3,), x.shape[1] ** -0.5), "no other form is known"),
    ],
)
def test_what_may_stay_or_has_no_form_is_left_alone(function, reason):
    assert WriteOutSizes()(of_sizes(function)).reason == reason


def example() -> Example:
    return Example(WriteOutSizes(), of_sizes(scaled), (vectors(4, 7, seed=1),))
