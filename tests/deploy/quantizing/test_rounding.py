"""Weights in 4 bits: what they are as floats, and that errors are made up for where data says what counts.

S samples, K features in, N out
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.deploy.quantizing.test_products import named
from thesean.deploy.quantizing.blocks import put_in_place
from thesean.deploy.quantizing.rounding import round_weights

BLOCK = 32


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(samples: int, count: int) -> torch.Tensor:
    """That depend on each other, some of them large, the last one always 0."""
    x_SK = drawn(samples, count, seed=1) @ drawn(count, count, seed=2) * torch.linspace(0.01, 3, count)
    x_SK[:, -1] = 0
    return x_SK


@pytest.mark.parametrize("count", [32, 64, 80, 7])
def test_without_data_each_weight_is_the_nearest_level(count):
    weight_KN = drawn(count, 5)
    found = round_weights(weight_KN, BLOCK)
    assert found.level_KN.dtype == found.zero_GN.dtype == torch.uint8
    assert found.level_KN.shape == (-(-count // BLOCK) * BLOCK, 5)
    assert found.level_KN.max() <= 15
    assert (found.weight_KN[count:] == 0).all()
    step_KN = found.scale_GN.repeat_interleave(BLOCK, 0)[:count]
    inside = (found.level_KN[:count] > 0) & (found.level_KN[:count] < 15)
    off_KN = (found.weight_KN[:count] - weight_KN).abs()
    assert (off_KN[inside] <= step_KN[inside] * 0.501).all()
    whole = (weight_KN.amax(0).clamp(min=0) - weight_KN.amin(0).clamp(max=0)) / 15
    assert off_KN.square().mean() <= (whole.square() / 12).mean() * 1.1  # what rounding to the whole range costs


def test_a_scale_that_cuts_off_the_largest_is_taken_where_it_costs_less():
    weight_KN = drawn(32, 200)
    low_N, high_N = weight_KN.amin(0), weight_KN.amax(0)
    step_N = (high_N - low_N) / 15
    zero_N = (-low_N / step_N).round()
    whole_KN = step_N * (((weight_KN / step_N).round() + zero_N).clamp(0, 15) - zero_N)
    found = round_weights(weight_KN, BLOCK)
    wrong, of_whole = ((w - weight_KN).square().sum(0) for w in (found.weight_KN, whole_KN))
    assert (wrong <= of_whole * 1.001).all()
    assert 0.3 < (found.scale_GN[0] < 0.99 * step_N).float().mean() < 0.95
    assert wrong.mean() < 0.95 * of_whole.mean()


def test_levels_that_there_are_stay_as_they_are():
    """0 stays 0, whatever the block's sign."""
    level_KN = torch.arange(64 * 3).reshape(64, 3) * 7 % 16
    level_KN[:2], level_KN[32:34] = torch.tensor([[0], [15]]), torch.tensor([[0], [15]])
    for zero in (0, 6, 15):
        weight_KN = 0.25 * (level_KN - zero)
        for gram_KK in (None, features(200, 64).T @ features(200, 64)):
            torch.testing.assert_close(round_weights(weight_KN, BLOCK, gram_KK).weight_KN, weight_KN)


@pytest.mark.parametrize("count", [64, 160, 70])
def test_errors_are_made_up_for_by_what_data_is(count):
    x_SK, weight_KN = features(400, count), drawn(count, 24)
    plain, made_up = (round_weights(weight_KN, BLOCK, gram).weight_KN[:count] for gram in (None, x_SK.T @ x_SK))
    wrong = [float((x_SK @ (w - weight_KN)).square().mean()) for w in (plain, made_up)]
    assert wrong[1] < 0.5 * wrong[0]
    unseen = features(800, count)[400:]
    assert (unseen @ (made_up - weight_KN)).square().mean() < 0.6 * (unseen @ (plain - weight_KN)).square().mean()


def test_data_that_is_all_zeros_is_as_none():
    weight_KN = drawn(40, 6)
    plain, nothing = round_weights(weight_KN, BLOCK), round_weights(weight_KN, BLOCK, torch.zeros(40, 40))
    assert torch.equal(plain.level_KN, nothing.level_KN)


def test_weights_that_are_all_zeros_stay_so():
    for gram_KK in (None, torch.eye(33)):
        found = round_weights(torch.zeros(33, 2), BLOCK, gram_KK)
        assert (found.weight_KN == 0).all()
        assert found.scale_GN.isfinite().all()


@pytest.mark.parametrize(("count", "outputs"), [(64, 8), (70, 5), (32, 1), (7, 3)])
def test_the_operator_computes_with_what_was_rounded(count, outputs):
    model = named(f"g (float[batch, {count}] x, float[{count}, {outputs}] W) => (float[batch, {outputs}] y) "
                  "{ y = MatMul (x, W) }")  # fmt: skip
    weight_KN, x_SK = drawn(count, outputs), drawn(3, count, seed=5)
    model.graph.initializers["W"].const_value = ir.tensor(weight_KN.numpy())
    (node,) = model.graph
    rounded = round_weights(weight_KN, BLOCK)
    put_in_place(node, rounded, BLOCK, accuracy=0)
    model.opset_imports["com.microsoft"] = 1
    assert set(model.graph.initializers) == {"W.levels", "W.scales", "W.zeros"}
    assert [n.name for n in model.graph] == ["y_Q4"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": x_SK.numpy()})
    np.testing.assert_allclose(found, (x_SK @ rounded.weight_KN[:count]).numpy(), rtol=1e-4, atol=1e-4)


def test_weights_of_two_products_are_rounded_for_each():
    model = named("""g (float[batch, 32] x, float[32, 32] W) => (float[batch, 32] y)
    {
        once = MatMul (x, W)
        y = MatMul (once, W)
    }""")
    for seed, node in enumerate(list(model.graph)):
        put_in_place(node, round_weights(drawn(32, 32, seed=seed), BLOCK), BLOCK, accuracy=0)
    assert sorted(model.graph.initializers) == [
        "W.levels",
        "W.levels_1",
        "W.scales",
        "W.scales_1",
        "W.zeros",
        "W.zeros_1",
    ]
