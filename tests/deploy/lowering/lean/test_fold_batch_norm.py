"""A norm by the batch as scale and bias of the layer norm in front of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.deploy.lowering.lean.test_lean import built, run
from thesean.deploy.lowering.lean.fold_batch_norm import fold_batch_norm

NORMS = """g ({x}, float[8] S, float[8] B, float[8] G, float[8] H, float[8] M, float[8] V) => ({x_out}{more})
{{
    a = LayerNormalization <axis = {axis}> (x, S{bias})
    y = BatchNormalization <epsilon = 0.01> (a, G, H, M, V)
{end}}}"""


def norms(axis: int = -1, bias: str = ", B", more: str = "", end: str = "", size: str = "batch, 8") -> Any:
    text = NORMS.format(
        axis=axis, bias=bias, more=more, end=end, x=f"float[{size}] x", x_out=f"float[{size}] y"
    )  # fmt: skip
    model = built(text)
    variance = model.graph.initializers["V"]
    variance.const_value = type(variance.const_value)(np.square(variance.const_value.numpy()))
    return model


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("bias", [", B", ""])
@pytest.mark.parametrize("axis", [-1, 1])
def test_it_is_folded_and_the_numbers_stay(axis, bias):
    model = norms(axis, bias)
    before = run(model)
    assert fold_batch_norm(model) == 1
    assert kinds(model) == ["LayerNormalization"]
    assert set(model.graph.initializers) <= {"S.folded", "S.bias.folded", "B"}
    for a, b in zip(before, run(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_others_read_too_stays():
    more = norms(more=", float[batch, 8] z", end="    z = Relu (a)\n")
    assert fold_batch_norm(more) == 0
    given = norms(more=", float[batch, 8] a")
    assert fold_batch_norm(given) == 0
    assert kinds(given) == ["LayerNormalization", "BatchNormalization"]


def test_channels_that_are_not_what_the_layer_norm_scales_stay():
    assert fold_batch_norm(norms(size="batch, 8, 8")) == 0
