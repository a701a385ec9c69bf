"""CKA against its textbook form in float64. N examples, P width of x, Q width of y"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import GRADIENT, relative_error
from thesean.kernels import cka as module
from thesean.kernels.cka import cka, cka_distance, prepare

WIDE, TALL = (64, 96, 70), (160, 24, 40)  # (N, P, Q): the Gram form, the feature form


def textbook(x_NP: torch.Tensor, y_NQ: torch.Tensor, debiased: bool) -> torch.Tensor:
    """H K H and the U-statistic as they stand in the papers."""
    n = x_NP.shape[0]
    # neither depends on the features' means, but at an offset of 300 float64 itself would lose six digits to them
    x_NP, y_NQ = x_NP - x_NP.mean(0), y_NQ - y_NQ.mean(0)
    gram_x, gram_y = x_NP @ x_NP.mT, y_NQ @ y_NQ.mT
    one_N = torch.ones(n, dtype=x_NP.dtype)

    def hsic(a_NN: torch.Tensor, b_NN: torch.Tensor) -> torch.Tensor:
        if not debiased:
            centre_NN = torch.eye(n, dtype=x_NP.dtype) - 1 / n
            return torch.trace(a_NN @ centre_NN @ b_NN @ centre_NN)
        a_NN, b_NN = (m - torch.diag(m.diagonal()) for m in (a_NN, b_NN))
        sums = (one_N @ a_NN @ one_N) * (one_N @ b_NN @ one_N) / ((n - 1) * (n - 2))
        return torch.trace(a_NN @ b_NN) + sums - 2 / (n - 2) * (one_N @ a_NN @ b_NN @ one_N)

    return hsic(gram_x, gram_y) / (hsic(gram_x, gram_x) * hsic(gram_y, gram_y)).sqrt()


def features(
    shape: tuple[int, int, int], offset: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Two sides with some of their structure in common."""
    n, p, q = shape
    g = torch.Generator().manual_seed(n + p + q)
    shared = torch.randn(n, 8, generator=g, dtype=torch.float64)
    sides = []
    for width in (p, q):
        own = torch.randn(n, width, generator=g, dtype=torch.float64)
        mixed = shared @ torch.randn(8, width, generator=g, dtype=torch.float64) / 2 + own + offset
        sides.append(mixed.to(dtype).requires_grad_())
    return sides


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().requires_grad_()


def test_the_sizes_of_these_tests_cover_both_forms():
    assert module._cheaper_form(*WIDE) == "gram"
    assert module._cheaper_form(*TALL) == "feature"


@pytest.mark.parametrize("prepared", [False, True], ids=["features", "prepared"])
@pytest.mark.parametrize("debiased", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["gram", "feature"])
@pytest.mark.parametrize("function", [cka, cka_distance])
def test_float32_keeps_its_digits_at_any_offset(function, shape, offset, debiased, prepared):
    x_NP, y_NQ = features(shape, offset)
    exact_x_NP, exact_y_NQ = exact(x_NP), exact(y_NQ)
    expected = textbook(exact_x_NP, exact_y_NQ, debiased)
    if function is cka_distance:
        expected = 1 - expected
    value = function(x_NP, prepare(y_NQ, student_width=shape[1]) if prepared else y_NQ, debiased=debiased)
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32
    assert abs(value.item() - expected.item()) < 1e-6
    assert relative_error(x_NP.grad, exact_x_NP.grad) < GRADIENT[torch.float32]
    if prepared:
        assert y_NQ.grad is None
    else:
        assert relative_error(y_NQ.grad, exact_y_NQ.grad) < GRADIENT[torch.float32]


@pytest.mark.parametrize("debiased", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("shape", [(6, 9, 7), (12, 3, 4)], ids=["gram", "feature"])
@pytest.mark.parametrize("function", [cka, cka_distance])
def test_the_handwritten_gradient_is_the_numerical_one(function, shape, debiased):
    x_NP, y_NQ = features(shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: function(x, y, debiased=debiased), (x_NP, y_NQ))
    guide = prepare(y_NQ)
    assert torch.autograd.gradcheck(lambda x: function(x, guide, debiased=debiased), (x_NP,))


@pytest.mark.parametrize("debiased", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("shape", [(64, 80), (160, 20)], ids=["gram", "feature"])
def test_the_distance_keeps_its_digits_where_one_minus_cka_has_none(shape, debiased):
    g = torch.Generator().manual_seed(0)
    y_NP = torch.randn(shape, generator=g)
    x_NP = (y_NP + 1e-4 * torch.randn(shape, generator=g)).requires_grad_()
    exact_x_NP = exact(x_NP)
    expected = 1 - textbook(exact_x_NP, y_NP.double(), debiased)
    expected.backward()
    assert 1e-9 < expected.item() < 1e-7
    value = cka_distance(x_NP, y_NP, debiased=debiased)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert relative_error(x_NP.grad, exact_x_NP.grad) < 1e-2  # 1e-7 of rounding over a distance of 1e-4
    assert cka_distance(y_NP, y_NP, debiased=debiased).item() < 1e-14


def test_a_known_value_worked_by_hand():
    # centred: x = (-3, -1, 1, 3) / 2, y = (-1, 1, -1, 1) / 2; <x, y>^2 = 1, |x|^2 |y|^2 = 5, so CKA = 1 / 5
    x_N1 = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    y_N1 = torch.tensor([[7.0], [8.0], [7.0], [8.0]])
    assert cka(x_N1, y_N1).item() == pytest.approx(0.2, abs=1e-7)
    assert cka_distance(x_N1, y_N1).item() == pytest.approx(0.8, abs=1e-7)


def test_the_debiased_form_reads_nothing_between_unrelated_features():
    g = torch.Generator().manual_seed(0)
    x_NP, y_NQ = torch.randn(64, 512, generator=g), torch.randn(64, 512, generator=g)
    assert cka(x_NP, y_NQ).item() > 0.8
    assert abs(cka(x_NP, y_NQ, debiased=True).item()) < 0.1


def test_only_the_side_that_asks_gets_a_gradient():
    x_NP, y_NQ = features(WIDE)
    cka(x_NP, y_NQ.detach()).backward()
    assert x_NP.grad is not None
    assert y_NQ.grad is None
    cka(x_NP.detach(), y_NQ).backward()
    assert y_NQ.grad is not None


def test_a_prepared_guide_serves_every_student_and_keeps_no_features_it_does_not_read():
    x_NP, y_NQ = features(WIDE)
    guide = prepare(y_NQ)
    assert guide.form == "gram"
    assert guide.centred_NP is None
    for width in (WIDE[1], 3):
        student_NP = x_NP[:, :width]
        assert cka(student_NP, guide).item() == pytest.approx(cka(student_NP, y_NQ).item(), abs=1e-6)


def test_a_long_gram_is_summed_in_pieces_without_a_difference(monkeypatch):
    x_NP, y_NQ = features(WIDE, dtype=torch.float64)
    whole = cka(x_NP, y_NQ)
    monkeypatch.setattr(module, "_DOT_ELEMENTS", 200)
    assert cka(x_NP, y_NQ).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_features_of_any_scale_neither_overflow_nor_vanish(scale):
    x_NP, y_NQ = features(WIDE)
    scaled_NP = (x_NP.detach() * scale).requires_grad_()
    cka(x_NP, y_NQ).backward()
    value = cka(scaled_NP, y_NQ)
    value.backward()
    assert scaled_NP.grad is not None
    assert value.item() == pytest.approx(cka(x_NP, y_NQ).item(), abs=1e-6)
    assert relative_error(scaled_NP.grad * scale, x_NP.grad) < GRADIENT[torch.float32]


def test_autocast_does_not_lower_the_precision():
    x_NP, y_NQ = features(WIDE)
    expected = cka(x_NP, y_NQ)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cka(x_NP, y_NQ), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x_NP, y_NQ = features(WIDE, dtype=dtype)
    value = cka(x_NP, y_NQ)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(textbook(exact(x_NP), exact(y_NQ), False).item(), abs=1e-6)
    assert x_NP.grad is not None
    assert x_NP.grad.dtype == dtype


def test_features_that_do_not_vary_give_nan_and_not_a_number_made_of_rounding():
    y_NQ = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert cka(torch.full((8, 3), 300.1), y_NQ).isnan()
    # distinct one-hot rows differ only by their own entry, which the debiased form leaves out
    assert cka(torch.eye(8), y_NQ, debiased=True).isnan()


def test_too_few_or_unequal_examples_are_refused():
    with pytest.raises(ValueError, match="N >= 4 examples, as many in x as in y, found 3, 3"):
        cka(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="found 8, 9"):
        cka_distance(torch.randn(8, 2), torch.randn(9, 2))
