"""What holds for each measure, and a value of each worked by hand. N examples, P width"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thesean.similarity import get_measure, measures, similarity

SETTINGS = settings(max_examples=25, deadline=None)
ROTATION_BLIND = ("cka", "cka-debiased", "rbf-cka", "dmnn", "mutual-knn", "rsa", "procrustes", "svcca")
TRAINABLE = [name for name in measures() if get_measure(name).differentiable]
sizes = st.tuples(st.integers(6, 40), st.integers(2, 40))
seeds = st.integers(0, 2**31)


def features(size: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitting(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Canonical correlations need more examples than features, unless all are to be 1."""
    return (size[0] + size[1], size[1]) if name in ("svcca", "pwcca") else size


def rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(features((width, width), seed)).Q


@pytest.mark.parametrize("name", measures())
@SETTINGS
@given(size=sizes, seed=seeds)
def test_activations_are_most_similar_to_themselves(name, size, seed):
    measure, size = get_measure(name), fitting(name, size)
    x_NP, y_NP = features(size, seed), features(size, seed + 1)
    best = measure.value(x_NP, x_NP).item()
    assert best == pytest.approx(1.0 if measure.higher_is_better else 0.0, abs=1e-9)
    other = measure.value(x_NP, y_NP).item()
    assert other < best if measure.higher_is_better else other > best


@pytest.mark.parametrize("name", TRAINABLE)
@SETTINGS
@given(size=sizes, seed=seeds)
def test_a_loss_is_zero_at_identity_and_above_it_elsewhere(name, size, seed):
    measure, x_NP = get_measure(name), features(size, seed)
    assert 0 <= measure.loss(x_NP, x_NP).item() < 1e-12
    assert measure.loss(x_NP, features(size, seed + 1)).item() > 1e-3


@pytest.mark.parametrize("name", ROTATION_BLIND)
@SETTINGS
@given(size=sizes, seed=seeds, scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_geometry_is_blind_to_rotation_scale_and_shift(name, size, seed, scale, shift):
    size = fitting(name, size)
    x_NP, y_NP = features(size, seed), features(size, seed + 1)
    moved_NP = scale * x_NP @ rotation(size[1], seed + 2) + shift
    expected = similarity(x_NP, y_NP, name).item()
    assert similarity(moved_NP, y_NP, name).item() == pytest.approx(expected, abs=1e-8)
    assert similarity(y_NP, x_NP, name).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", sorted(set(TRAINABLE) - set(ROTATION_BLIND)))
def test_the_other_measures_see_a_rotation(name):
    x_NP = features((20, 6), 0)
    measure = get_measure(name)
    assert measure.loss(x_NP @ rotation(6, 1), x_NP).item() > 0.1


@pytest.mark.parametrize("name", TRAINABLE)
def test_value_and_loss_have_the_numerical_gradient(name):
    measure = get_measure(name)
    x_NP, y_NP = features((7, 3), 0).requires_grad_(), features((7, 3), 1).requires_grad_()
    assert torch.autograd.gradcheck(measure.value, (x_NP, y_NP))
    assert torch.autograd.gradcheck(measure.loss, (x_NP, y_NP))


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_step_down_the_loss_makes_the_value_better(name):
    measure = get_measure(name)
    x_NP, y_NP = features((16, 5), 0).requires_grad_(), features((16, 5), 1)
    before = measure.value(x_NP, y_NP).item()
    measure.loss(x_NP, y_NP).backward()
    assert x_NP.grad is not None
    after = measure.value(x_NP - 1e-3 * x_NP.grad / x_NP.grad.norm(), y_NP).item()
    assert after > before if measure.higher_is_better else after < before


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_prepared_guide_gives_the_same_value_and_loss(name):
    measure, x_NP, y_NP = get_measure(name), features((16, 5), 0), features((16, 5), 1)
    guide = measure.prepare(y_NP)
    assert measure.value(x_NP, guide).item() == pytest.approx(measure.value(x_NP, y_NP).item(), rel=1e-12)
    assert measure.loss(x_NP, guide).item() == pytest.approx(measure.loss(x_NP, y_NP).item(), rel=1e-12)


def test_values_worked_by_hand():
    x_NP = torch.tensor([[0.0, 2.0], [3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    y_NP = torch.tensor([[2.0, 0.0], [3.0, 4.0], [1.0, 1.0], [2.0, 3.0]])
    # squared differences by row 8, 0, 1, 13; y's mean is (2, 2), squared deviations by row 4, 5, 2, 1
    assert similarity(x_NP, y_NP, "mse").item() == pytest.approx(22 / 8)
    assert similarity(x_NP, y_NP, "nmse").item() == pytest.approx(22 / 12)
    # cosines by row 0, 1, 1/sqrt 2, and 0 for the row of zeros
    assert similarity(x_NP, y_NP, "cosine").item() == pytest.approx((1 + 1 / math.sqrt(2)) / 4)


def test_predicting_the_mean_costs_one_in_normalised_error():
    y_NP = features((9, 4), 0)
    assert similarity(y_NP.mean(0).expand(9, 4), y_NP, "nmse").item() == pytest.approx(1.0)


def test_debiased_cka_of_four_examples_worked_by_hand():
    # centred products of (0,1,2,3) and (0,1,0,1), off the diagonal: only those enter the U-statistic
    x_N1 = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    y_N1 = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    # n=4: S - 2 <dx, dy> + tx ty / 6, dx = (9, 1, 1, 9)/4, dy = (1, 1, 1, 1)/4, tx = 5, ty = 1
    hxy = 1 - 2 * 5 / 4 + 5 / 6
    hxx = 25 - 2 * 164 / 16 + 25 / 6
    hyy = 1 - 2 * 4 / 16 + 1 / 6
    assert similarity(x_N1, y_N1, "cka-debiased").item() == pytest.approx(hxy / math.sqrt(hxx * hyy), abs=1e-6)
