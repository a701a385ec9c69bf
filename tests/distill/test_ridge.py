"""The regression by itself: B batch, T time, N rows, E features, O outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thesean.distill.ridge import Ridge, _Centred, _Solution, held_out
from thesean.errors import NumericalError

NONE = torch.zeros(64, dtype=torch.bool)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(
    features_NE: torch.Tensor,
    wanted_NO: torch.Tensor,
    apart_N: torch.Tensor = NONE,
    ridge: float = 1e-9,
    bias: bool = True,
) -> nn.Linear:
    last = nn.Linear(features_NE.shape[1], wanted_NO.shape[1], bias)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    regression = Ridge(last)
    with torch.no_grad():
        regression.add(features_NE, wanted_NO, apart_N)
        regression.solve(ridge, "layers.0")
    return last


def test_a_row_that_counts_twice_is_a_row_that_came_twice():
    last, weight_N = nn.Linear(3, 2), torch.tensor([2.0, 1, 3, 1])
    features_NE, wanted_NO, apart_N = drawn(4, 3), drawn(4, 2, seed=1), torch.tensor([False, False, True, True])
    often = weight_N.long()
    found, expected, plain, ones = (Ridge(last) for _ in range(4))
    with torch.no_grad():
        found.add(features_NE, wanted_NO, apart_N, weight_N)
        expected.add(*(z.repeat_interleave(often, 0) for z in (features_NE, wanted_NO, apart_N)))
        plain.add(features_NE, wanted_NO, apart_N)
        ones.add(features_NE, wanted_NO, apart_N, torch.ones(4))
    assert [float(part[0]) for part in found.statistics] == [3, 4]
    for one, other in ((found, expected), (plain, ones)):
        torch.testing.assert_close(one.statistics, other.statistics)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_what_is_fitted_is_the_least_squares_solution_however_small_features_are(scale):
    features_NE, wanted_NO = scale * (drawn(64, 3) + 1), drawn(64, 2, seed=1) + 1
    rows_NE = torch.cat([features_NE / scale, torch.ones(64, 1)], 1)
    fitted_NO = rows_NE @ torch.linalg.lstsq(rows_NE, wanted_NO).solution
    torch.testing.assert_close(solved(features_NE, wanted_NO)(features_NE), fitted_NO, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("apart_N", [NONE, torch.arange(64) % 4 == 1])
def test_a_layer_without_a_bias_is_fitted_without_an_intercept(apart_N):
    features_NE, wanted_NO = drawn(64, 3) + 2, drawn(64, 2, seed=1) + 5
    weight_EO = torch.linalg.lstsq(features_NE, wanted_NO).solution
    found = solved(features_NE, wanted_NO, apart_N, bias=False)
    torch.testing.assert_close(found.weight, weight_EO.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centre", [0.0, 2.0])
def test_a_gain_is_by_how_much_the_mean_squared_error_of_the_rows_changes(centre):
    features_NE, error_NO = (drawn(40, 3) + centre).double(), (drawn(40, 2, seed=1) - centre).double()
    weight_EO, bias_O = drawn(3, 2, seed=2).double(), drawn(2, seed=3).double()
    mean_E, mean_O = features_NE.mean(0), error_NO.mean(0)
    rows = _Centred(
        mean_E,
        mean_O,
        features_NE.T @ features_NE / 40 - mean_E.outer(mean_E),
        features_NE.T @ error_NO / 40 - mean_E.outer(mean_O),
    )
    after_NO = error_NO - features_NE @ weight_EO - bias_O
    wanted = (after_NO.square().sum() - error_NO.square().sum()) / 40
    assert _Solution(weight_EO, bias_O).gain(rows) == pytest.approx(float(wanted))


def test_a_layer_stays_where_nothing_that_is_held_out_gets_better_and_else_fits_those_rows_too():
    features_NE, wanted_NO, apart_N = drawn(64, 3), drawn(64, 2, seed=1), torch.arange(64) >= 48
    against = torch.where(apart_N.unsqueeze(1), -features_NE[:, :2], features_NE[:, :2])
    assert not any(p.any() for p in solved(features_NE, against, apart_N).parameters())
    wanted_NO = features_NE[:, :2] + torch.where(apart_N, 0.5, 0.0).unsqueeze(1)
    one, other = solved(features_NE, wanted_NO, apart_N), solved(features_NE, wanted_NO)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.bias, other.bias, rtol=1e-4, atol=1e-5)


def test_a_ridge_is_as_large_as_what_is_held_out_asks_for():
    """Few rows of much noise: the largest of those tried; none at all to speak of: the recipe's own."""
    apart_N = torch.arange(64) % 4 == 1
    features_NE = drawn(64, 40)
    for noise, factor in ((3.0, 100.0), (0.0, 1.0)):
        wanted_NO = features_NE[:, :2] + noise * drawn(64, 2, seed=1)
        found = solved(features_NE, wanted_NO, apart_N, ridge=0.1)
        wanted = solved(features_NE, wanted_NO, ridge=0.1 * factor)
        torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["features", "wanted"])
def test_one_number_that_is_none_names_the_part(where):
    rows = {"features": drawn(64, 3), "wanted": drawn(64, 2)}
    rows[where][5] = torch.inf
    with pytest.raises(NumericalError, match=r"^layers\.0: activations are not finite"):
        solved(rows["features"], rows["wanted"])


def test_one_example_in_four_is_held_out_with_all_its_tokens():
    assert held_out(range(6), 6).tolist() == [False, True, False, False, False, True]
    assert held_out(range(4, 6), 4).tolist() == [False, False, True, True]
    mask_BT = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert held_out(range(3), 5, mask_BT).tolist() == [False, False, True, True, False]
