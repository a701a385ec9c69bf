"""The checks that all measures share: each says what was found, what was expected and what to do."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import relative_error
from thesean.errors import DataError, NumericalError
from thesean.similarity import Measure, get_measure, similarity


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["cka", "cka-debiased"])
def test_cka_of_three_examples_is_refused(name):
    with pytest.raises(DataError, match=f"{name}: expected at least 4 examples, found 3 in x. Use a larger batch"):
        similarity(features(3, 5), features(3, 5, seed=1), name)
    assert similarity(features(4, 5), features(4, 5, seed=1), name).isfinite()


def test_two_equal_examples_are_not_constant_features():
    x_NP = features(8, 5)
    x_NP[1] = x_NP[0]
    assert similarity(x_NP, features(8, 5, seed=1)).isfinite()


def test_what_the_debiased_form_cannot_tell_apart_is_an_error_and_not_nan():
    with pytest.raises(NumericalError, match="cka-debiased: the result is nan for finite inputs"):
        similarity(torch.eye(8), features(8, 5), "cka-debiased")


def test_integers_and_empty_features_are_refused():
    with pytest.raises(DataError, match=r"expected y of .* and a floating dtype, found .* torch.int64"):
        similarity(features(8, 5), torch.ones(8, 5, dtype=torch.int64))
    with pytest.raises(DataError, match="x has no features"):
        similarity(features(8, 0), features(8, 5))


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(DataError, match="x is on cpu, y on meta"):
        get_measure("mse").value(features(8, 5), features(8, 5).to("meta"))


def test_what_a_measure_is_blind_to_is_read_off_it_and_misspelling_it_is_refused():
    assert get_measure("cka").blind_to == {"rotation", "scale", "shift"}
    assert get_measure("cosine").blind_to == {"scale"}
    assert get_measure("mse").blind_to == frozenset()
    with pytest.raises(
        ValueError, match=r"mine: blind_to: expected some of \['rotation', 'scale', 'shift'\], found 'tur"
    ):
        Measure(name="mine", summary="", value=torch.dist, blind_to=frozenset({"turning"}))


def test_a_prepared_guide_is_checked_when_it_is_made():
    measure = get_measure("cka")
    y_NP = features(8, 5)
    y_NP[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="y holds 1 values"):
        measure.prepare(y_NP)
    with pytest.raises(DataError, match="y is constant"):
        measure.prepare(torch.ones(8, 5))
    with pytest.raises(DataError, match="found 9 and 8"):
        measure.value(features(9, 5), measure.prepare(features(8, 5)))


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_the_public_function_keeps_its_digits_at_any_offset(offset):
    x_NP = (features(256, 512) + offset).requires_grad_()
    y_NQ = x_NP.detach()[:, :300] * 0.5 + features(256, 300, seed=1) + offset
    exact_x_NP = x_NP.detach().double().requires_grad_()
    x, y = exact_x_NP - exact_x_NP.mean(0), y_NQ.double() - y_NQ.double().mean(0)
    gram_x, gram_y = x @ x.T, y @ y.T
    expected = (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())
    value = similarity(x_NP, y_NQ, measure="cka")
    value.backward()
    expected.backward()
    assert abs(value.item() - expected.item()) < 1e-6
    assert relative_error(x_NP.grad, exact_x_NP.grad) < 1e-4
