"""E features, O outputs, S features kept, N examples"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thesean.targets.shared.select_features import FeatureMoments, fold, moments, select_features, select_groups

DOUBLE = torch.float64


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=DOUBLE)


def problem(seed: int, features: int, outputs: int = 3, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """covariance_EE of correlated features and weight_OE."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or 2 * features, features, generator=generator, dtype=DOUBLE)
    return mix.T @ mix / len(mix), torch.randn(outputs, features, generator=generator, dtype=DOUBLE)


def lost(covariance_EE: torch.Tensor, weight_OE: torch.Tensor, kept: torch.Tensor | list[int]) -> float:
    """The output's variance that the best linear map of the kept features can't give, from the definition."""
    kept_S = torch.as_tensor(kept)
    across_ES = covariance_EE[:, kept_S]
    rest_EE = covariance_EE - across_ES @ torch.linalg.pinv(covariance_EE[kept_S][:, kept_S]) @ across_ES.T
    return float((weight_OE @ rest_EE @ weight_OE.T).trace())


def test_independent_features_are_kept_by_what_they_add_to_the_output():
    # variance times squared weight: 4, 2 * 4 = 8, 9, 100 * 0 = 0
    covariance = torch.diag(torch.tensor([4.0, 2.0, 9.0, 100.0], dtype=DOUBLE))
    weight = matrix([1, 2, 1, 0])
    assert select_features(covariance, weight, 1).tolist() == [2]
    assert select_features(covariance, weight, 2).tolist() == [1, 2]
    assert select_features(covariance, weight, 3).tolist() == [0, 1, 2]


def test_a_feature_is_kept_once_however_many_copies_it_has():
    covariance = matrix([9, 9, 9, 0], [9, 9, 9, 0], [9, 9, 9, 0], [0, 0, 0, 1])
    kept = select_features(covariance, matrix([1, 1, 1, 1]), 2).tolist()
    assert kept[1] == 3
    assert lost(covariance, matrix([1, 1, 1, 1]), kept) == pytest.approx(0, abs=1e-12)


def test_features_that_add_nothing_fill_up_in_order_of_their_variance():
    covariance = matrix([9, 9, 0], [9, 9, 0], [0, 0, 0])
    assert select_features(covariance, matrix([1, 1, 1]), 2).tolist() == [0, 1]
    assert select_features(torch.zeros(3, 3), matrix([1, 1, 1]), 3).tolist() == [0, 1, 2]
    assert select_features(torch.full((3, 3), 0.5), matrix([1, 1, 1]), 2).tolist() == [0, 1]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), features=st.integers(2, 7))
def test_the_first_feature_is_the_best_one(seed, features):
    covariance, weight = problem(seed, features)
    (best,) = select_features(covariance, weight, 1).tolist()
    assert lost(covariance, weight, [best]) <= min(lost(covariance, weight, [i]) for i in range(features)) + 1e-9


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), features=st.integers(2, 12))
def test_more_features_lose_no_more_and_all_of_them_nothing(seed, features):
    covariance, weight = problem(seed, features)
    chosen = [select_features(covariance, weight, k) for k in range(1, features + 1)]
    assert all(len(set(kept.tolist())) == k for k, kept in enumerate(chosen, 1))
    losses = [lost(covariance, weight, kept) for kept in chosen]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_features_of_low_rank_are_spanned_by_as_many(seed):
    covariance, weight = problem(seed, features=12, rank=4)
    assert lost(covariance, weight, select_features(covariance, weight, 4)) < 1e-9 * lost(covariance, weight, [0])


def one_at_a_time(covariance: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """Greedy by definition: each step tries every feature."""
    kept: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(covariance)) if i not in kept]
        kept.append(min(left, key=lambda i: lost(covariance, weight, [*kept, i])))
    return kept


def test_blocks_of_pivots_lose_hardly_more_than_one_at_a_time():
    covariance, weight = problem(seed=0, features=120, outputs=10, rank=100)
    covariance *= torch.linspace(0.1, 2, 120, dtype=DOUBLE).outer(torch.linspace(0.1, 2, 120, dtype=DOUBLE))
    blocks = lost(covariance, weight, select_features(covariance, weight, 40))
    exact = lost(covariance, weight, one_at_a_time(covariance, weight, 40))
    assert blocks < 1.05 * exact


def test_groups_are_kept_whole():
    # groups of two: 1 + 1 and 4 + 0 and 3 + 3 times a weight of one
    covariance = torch.diag(torch.tensor([1.0, 1.0, 4.0, 0.0, 3.0, 3.0], dtype=DOUBLE))
    weight = torch.ones(1, 6, dtype=DOUBLE)
    assert select_groups(covariance, weight, 2, 1).tolist() == [2]
    assert select_groups(covariance, weight, 2, 2).tolist() == [1, 2]
    assert select_groups(covariance, weight, 2, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e8])
def test_groups_are_chosen_alike_however_large_activations_are(scale):
    covariance = scale * torch.diag(torch.tensor([1.0, 1.0, 4.0, 0.0, 3.0, 3.0], dtype=DOUBLE))
    assert select_groups(covariance, torch.ones(1, 6, dtype=DOUBLE), 2, 2).tolist() == [1, 2]
    assert select_groups(covariance, torch.zeros(1, 6, dtype=DOUBLE), 2, 2).tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1e-12, 1.0])
def test_a_group_that_repeats_another_is_not_kept_beside_it(scale):
    small = matrix([3, 0], [0, 3])
    covariance = scale * torch.block_diag(torch.cat([torch.cat([small, small], 1)] * 2), torch.eye(2, dtype=DOUBLE))
    kept = select_groups(covariance, torch.ones(1, 6, dtype=DOUBLE), 2, 2).tolist()
    assert kept in ([0, 2], [1, 2])


def test_what_can_be_said_exactly_is_folded_exactly():
    """f = (z, z + 5) and y = f_0 + 2 f_1: with f_0 alone, y = 3 f_0 + 10. Var(z) = 1, E z = 4."""
    known = FeatureMoments(100, torch.tensor([4.0, 9.0], dtype=DOUBLE), matrix([1, 1], [1, 1]))
    weight, bias = fold(known, matrix([1, 2]), torch.tensor([0]))
    torch.testing.assert_close(weight, matrix([3]))
    torch.testing.assert_close(bias, torch.tensor([10.0], dtype=DOUBLE))


def test_with_one_example_a_feature_the_change_is_halved():
    """N = S, and noise enough for the largest lambda, the mean variance: dW = 2 c / (1 + 1), c = 0.1."""
    known = FeatureMoments(1, torch.tensor([4.0, 9.0], dtype=DOUBLE), matrix([1, 0.1], [0.1, 1]))
    weight, bias = fold(known, matrix([1, 2]), torch.tensor([0]))
    torch.testing.assert_close(weight, matrix([1.1]))
    torch.testing.assert_close(bias, torch.tensor([2 * 9 - 0.1 * 4], dtype=DOUBLE))  # the mean is kept


def test_the_penalty_is_what_noise_and_examples_ask_for():
    """dW = 3 c / (1 + l) with l = S s^2 / (N dW^2), s^2 = 9 - 6 c dW + dW^2: here c = 0.8, N = 1000."""
    known = FeatureMoments(1000, torch.zeros(2, dtype=DOUBLE), matrix([1, 0.8], [0.8, 1]))
    weight, _ = fold(known, matrix([1, 3]), torch.tensor([0]))
    change = float(weight) - 1
    penalty = (9 - 4.8 * change + change**2) / (1000 * change**2)
    assert change == pytest.approx(2.4 / (1 + penalty), rel=1e-4)
    assert penalty == pytest.approx(0.36 / 0.64 / 1000, rel=1e-2)


def test_folding_with_all_features_changes_nothing():
    covariance, weight = problem(0, 5)
    known = FeatureMoments(10, torch.ones(5, dtype=DOUBLE), covariance)
    folded, bias = fold(known, weight, torch.arange(5))
    torch.testing.assert_close(folded, weight, rtol=0, atol=0)
    torch.testing.assert_close(bias, torch.zeros(3, dtype=DOUBLE), rtol=0, atol=0)


def test_features_without_variance_are_no_division_by_zero():
    known = FeatureMoments(10, torch.ones(3, dtype=DOUBLE), torch.zeros(3, 3, dtype=DOUBLE))
    folded, bias = fold(known, matrix([1, 2, 3]), torch.tensor([0]))
    torch.testing.assert_close(folded, matrix([1]))
    torch.testing.assert_close(bias, torch.tensor([5.0], dtype=DOUBLE))


def test_moments_over_batches_are_those_of_all_rows_even_far_from_zero():
    x = torch.randn(60, 4, dtype=DOUBLE) + 1e6
    known = moments([x[:20].view(4, 5, 4), x[20:]])
    assert known.count == 60
    torch.testing.assert_close(known.mean_E, x.mean(0))
    torch.testing.assert_close(known.covariance_EE, x.T.cov(correction=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"), [([], "no examples"), ([torch.tensor([[1.0], [float("nan")]])], "not finite")]
)
def test_moments_of_nothing_or_of_nan_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        moments(batches)
