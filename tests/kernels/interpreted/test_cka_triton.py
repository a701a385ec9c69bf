"""The Triton kernels of CKA against the textbook's H K H in float64. N examples, P width of x, Q width of y"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import KERNEL_GRADIENT, KERNEL_VALUE, relative_error
from thesean.kernels.cka import cka, cka_distance, prepare
from thesean.kernels.shared import grams_triton

SIZES = [(7, 5, 3, 0.0), (64, 32, 70, 50.0), (150, 77, 130, 50.0)]


def features(n: int, p: int, q: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    shared_NK = torch.randn(n, 8, generator=g)
    return [
        (shared_NK @ torch.randn(8, w, generator=g) + torch.randn(n, w, generator=g) + offset)
        .to(dtype)
        .requires_grad_()
        for w in (p, q)
    ]


def textbook(x_NP: torch.Tensor, y_NQ: torch.Tensor, *, debiased: bool) -> torch.Tensor:
    """Kornblith et al. 2019 with H K H, and Song et al. 2012 on Grams without their diagonal."""
    n = x_NP.shape[0]
    k, l = x_NP @ x_NP.T, y_NQ @ y_NQ.T
    eye, one = torch.eye(n, dtype=k.dtype), torch.ones(n, dtype=k.dtype)

    def hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:
        if not debiased:
            centring = eye - 1 / n
            return ((centring @ k @ centring) * l).sum()
        k, l = k * (1 - eye), l * (1 - eye)
        total = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (k * l).sum() + total - 2 / (n - 2) * (one @ k @ l @ one)

    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


@pytest.fixture(params=[1, 3], ids=["fused", "split"])
def slices(request, monkeypatch) -> int:
    """Both ways to a Gram, at sizes for which the table would take only one."""
    monkeypatch.setattr(grams_triton, "slices", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("n", "p", "q", "offset"), SIZES)
def test_float32_values_and_gradients_are_those_of_the_textbook(n, p, q, offset, debiased, slices):
    x_NP, y_NQ = features(n, p, q, offset=offset)
    exact = [x.detach().double().requires_grad_() for x in (x_NP, y_NQ)]
    expected = textbook(*exact, debiased=debiased)
    expected_grads = torch.autograd.grad(expected, exact)
    for measure, reference, sign in ((cka, expected, 1), (cka_distance, 1 - expected, -1)):
        value = measure(x_NP, y_NQ, debiased=debiased, backend="triton")
        assert value.dtype == torch.float32
        assert abs(value.item() - reference.item()) < KERNEL_VALUE[torch.float32]
        for grad, exact_grad in zip(torch.autograd.grad(value, [x_NP, y_NQ]), expected_grads, strict=True):
            assert relative_error(grad, sign * exact_grad) < KERNEL_GRADIENT[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("debiased", "count"), [(False, 3), (True, 1)], ids=["biased, split", "debiased, fused"])
def test_half_precision_gradients_are_those_of_the_rounded_features(dtype, debiased, count, monkeypatch):
    monkeypatch.setattr(grams_triton, "slices", lambda *_: count)
    x_NP, y_NQ = features(150, 77, 130, dtype, offset=50.0)
    exact = [x.detach().double().requires_grad_() for x in (x_NP, y_NQ)]
    value, expected = cka(x_NP, y_NQ, debiased=debiased, backend="triton"), textbook(*exact, debiased=debiased)
    assert abs(value.item() - expected.item()) < 1e-4
    grads, expected_grads = torch.autograd.grad(value, [x_NP, y_NQ]), torch.autograd.grad(expected, exact)
    for grad, exact_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, exact_grad) < KERNEL_GRADIENT[dtype]


@pytest.mark.parametrize("width", [20, 400], ids=["from features", "from the Gram"])
def test_a_prepared_guide_gives_the_same_value_and_gradient(width, slices):
    x_NP, y_NQ = features(70, width, width)
    for measure in (cka, cka_distance):
        direct = measure(x_NP, y_NQ.detach(), backend="triton")
        cached = measure(x_NP, prepare(y_NQ), backend="triton")
        assert abs(direct.item() - cached.item()) < KERNEL_VALUE[torch.float32]
        grads = [torch.autograd.grad(value, x_NP)[0] for value in (direct, cached)]
        assert relative_error(grads[0], grads[1]) < KERNEL_GRADIENT[torch.float32]


def test_the_distance_keeps_its_digits_near_convergence():
    x_NP, noise_NP = features(80, 40, 40)
    y_NP = x_NP.detach() + 1e-3 * noise_NP.detach()
    value = cka_distance(x_NP, y_NP, backend="triton")
    exact_NP = x_NP.detach().double().requires_grad_()
    expected = 1 - textbook(exact_NP, y_NP.double(), debiased=False)
    assert 1e-8 < expected.item() < 1e-5
    assert relative_error(value, expected) < 1e-2  # in float32, 1 - CKA has none here
    (grad,), (exact_grad,) = torch.autograd.grad(value, x_NP), torch.autograd.grad(expected, exact_NP)
    assert relative_error(grad, exact_grad) < 1e-2


def test_two_runs_agree_to_the_bit(slices):
    x_NP, y_NQ = features(150, 77, 130)
    runs = []
    for _ in range(2):
        value = cka(x_NP, y_NQ, debiased=True, backend="triton")
        runs.append([value, *torch.autograd.grad(value, [x_NP, y_NQ])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_features_that_do_not_vary_give_nan():
    x_NP, _ = features(20, 8, 8)
    assert cka(x_NP, torch.full((20, 3), 7.0), backend="triton").isnan()


def test_float64_is_refused_by_name():
    x_NP, y_NQ = features(20, 8, 8, torch.float64)
    with pytest.raises(
        ValueError, match="cka: expected bfloat16, float16, float32 for the Triton kernel, found float64"
    ):
        cka(x_NP, y_NQ, backend="triton")
