"""Soft mutual nearest neighbours. N examples, P width of x, Q width of y"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.dmnn import cosines, dmnn, dmnn_distance


def features(n: int, p: int, q: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    shared_NK = torch.randn(n, 6, generator=g, dtype=torch.float64)
    made = []
    for width in (p, q):
        own_NP = torch.randn(n, width, generator=g, dtype=torch.float64)
        mixed_NP = shared_NK @ torch.randn(6, width, generator=g, dtype=torch.float64) + own_NP
        made.append((mixed_NP + offset).to(dtype).requires_grad_())
    return made


def by_definition(x_NP: torch.Tensor, y_NQ: torch.Tensor, *, temperature: float = 0.1) -> torch.Tensor:
    """Softmax, product with the transpose, cosine: as the documentation says, without the closed forms."""
    mutuals = []
    for z_NP in (x_NP, y_NQ):
        z_NP = z_NP - z_NP.mean(0)
        z_NP = z_NP / z_NP.norm(dim=1, keepdim=True)
        itself = torch.eye(len(z_NP), dtype=torch.bool)
        p_NN = (z_NP @ z_NP.T / temperature).masked_fill(itself, -torch.inf).softmax(1)
        mutuals.append((p_NN * p_NN.T).flatten())
    return torch.nn.functional.cosine_similarity(mutuals[0], mutuals[1], dim=0, eps=0.0)


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_values_and_gradients_are_those_of_the_definition_in_float64(temperature, dtype, offset):
    x_NP, y_NQ = features(40, 7, 11, offset, dtype)
    exact = [x.detach().double().requires_grad_() for x in (x_NP, y_NQ)]
    expected = by_definition(*exact, temperature=temperature)
    value = dmnn(x_NP, y_NQ, temperature=temperature)
    apart = dmnn_distance(x_NP, y_NQ, temperature=temperature)
    assert value.dtype == dtype
    assert abs(value.item() - expected.item()) < VALUE[dtype]
    assert abs(1 - apart.item() - expected.item()) < VALUE[dtype]
    expected_grads = torch.autograd.grad(expected, exact)
    for result, sign in ((value, 1), (apart, -1)):
        for grad, exact_grad in zip(torch.autograd.grad(result, [x_NP, y_NQ]), expected_grads, strict=True):
            assert relative_error(sign * grad, exact_grad) < GRADIENT[dtype]


@pytest.mark.parametrize("measure", [dmnn, dmnn_distance])
def test_the_handwritten_gradient_is_the_numerical_one(measure):
    assert torch.autograd.gradcheck(measure, features(6, 4, 3))


def test_four_examples_in_two_pairs_worked_by_hand():
    # cosines 1 within a pair and -1 across: P is 1 / (1 + 2 e^-20) for the partner and e^-20 times it for the others
    x_N1 = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]], dtype=torch.float64)
    assert dmnn(x_N1, x_N1[[0, 1, 3, 2]]).item() == pytest.approx(1.0)
    # other pairs altogether: <Mx, My> is 2 e^-40 of |Mx|^2
    assert dmnn(x_N1, x_N1[[0, 2, 1, 3]]).item() == pytest.approx(2 * torch.tensor(-40.0).exp().item(), rel=1e-6)


def test_one_side_with_itself_gives_one_and_no_distance_or_gradient():
    x_NP, _ = features(30, 6, 6, dtype=torch.float32)
    assert dmnn(x_NP, x_NP.detach()).item() == pytest.approx(1.0, abs=1e-6)
    apart = dmnn_distance(x_NP, x_NP.detach())
    assert apart.item() < 1e-12
    assert torch.autograd.grad(apart, x_NP)[0].norm() < 1e-6


def test_scale_rotation_and_offset_change_nothing():
    x_NP, y_NQ = (x.detach() for x in features(30, 6, 6))
    turn_PP = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    torch.testing.assert_close(dmnn(7 * x_NP @ turn_PP + 3, y_NQ), dmnn(x_NP, y_NQ))


def test_the_distance_keeps_its_digits_near_convergence():
    x_NP, noise_NP = features(60, 8, 8, dtype=torch.float32)
    y_NP = x_NP.detach() + 1e-4 * noise_NP.detach()
    expected = dmnn_distance(x_NP.double(), y_NP.double())
    assert expected.item() < 1e-6
    assert relative_error(dmnn_distance(x_NP, y_NP), expected) < 1e-2  # in float32, 1 - dmnn has none here


@pytest.mark.parametrize("measure", [dmnn, dmnn_distance])
def test_a_prepared_guide_gives_the_same_value_and_gradient_at_any_temperature(measure):
    x_NP, y_NQ = features(30, 6, 9)
    guide_NN = cosines(y_NQ)
    assert not guide_NN.requires_grad
    for temperature in (0.1, 0.5):
        direct = measure(x_NP, y_NQ, temperature=temperature)
        cached = measure(x_NP, guide_NN, temperature=temperature, prepared=True)
        torch.testing.assert_close(cached, direct)
        torch.testing.assert_close(torch.autograd.grad(cached, x_NP), torch.autograd.grad(direct, x_NP))


def test_the_order_of_examples_matters_only_between_the_sides():
    x_NP, y_NQ = (x.detach() for x in features(30, 6, 9))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dmnn(x_NP[order], y_NQ[order]), dmnn(x_NP, y_NQ))
    assert dmnn(x_NP[order], y_NQ) < dmnn(x_NP, y_NQ)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(dtype):
    x_NP, y_NQ = (x.detach() for x in features(30, 6, 9, dtype=dtype))
    value = dmnn(x_NP, y_NQ)
    assert value.dtype == torch.float32
    assert abs(value.item() - by_definition(x_NP.double(), y_NQ.double()).item()) < VALUE[torch.float32]


def test_what_does_not_fit_is_named():
    x_NP, y_NQ = (x.detach() for x in features(30, 6, 9))
    with pytest.raises(ValueError, match=r"dmnn: expected N >= 4 examples, .* found 30, 29"):
        dmnn(x_NP, y_NQ[1:])
    with pytest.raises(ValueError, match="dmnn_distance: expected a temperature above 0, found 0"):
        dmnn_distance(x_NP, y_NQ, temperature=0.0)
