"""Every measure under the contract, and a value of some worked by hand. N examples, P width"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.similarity import contract
from tests.similarity.contract import CHECKS, features
from thesean.similarity import get_measure, measures, similarity

SETTINGS = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(6, 40), st.integers(2, 40))
seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", measures())
def test_every_measure_keeps_the_contract(name, check):
    check(get_measure(name))


@pytest.mark.parametrize("name", measures())
@SETTINGS
@given(size=sizes, seed=seeds)
@example(size=(6, 2), seed=1144414)  # both sides have the same two neighbours of six
def test_identity_is_the_best_that_there_is_at_any_size(name, size, seed):
    contract.check_nothing_is_more_similar_than_itself(get_measure(name), size, seed)
    contract.check_a_loss_is_zero_at_identity_and_above_it_elsewhere(get_measure(name), size, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in measures() if get_measure(name).blind_to])
@SETTINGS
@given(size=sizes, seed=seeds, scale=st.floats(1e-3, 1e3))
def test_a_blind_measure_is_blind_at_any_size(name, size, seed, scale):
    contract.check_it_is_blind_to_what_it_says(get_measure(name), size, seed, scale)


@pytest.mark.parametrize("name", ["cka", "cka-debiased", "rbf-cka", "dmnn", "mutual-knn", "rsa", "procrustes", "svcca"])
def test_these_measures_are_symmetric(name):
    x_NP, y_NQ = contract.correlated(get_measure(name), (40, 12))
    expected = similarity(x_NP, y_NQ, name).item()
    assert similarity(y_NQ, x_NP, name).item() == pytest.approx(expected, abs=1e-12)


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
