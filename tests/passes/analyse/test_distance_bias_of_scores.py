"""What scores of zero queries say of distances: read off the numbers alone.

T time, H heads
"""

from __future__ import annotations

import pytest
import torch

from thesean.passes.analyse.distance_bias import find_distance_bias
from thesean.targets.shared.distance_bias import HIDDEN

TIME = 12
STEP_T = torch.arange(TIME)
DISTANCE_TT = STEP_T[:, None] - STEP_T  # of a key behind its query
LATER_TT = DISTANCE_TT < 0


def hidden(where_TT: torch.Tensor, scores_HTT: torch.Tensor) -> torch.Tensor:
    return scores_HTT.masked_fill(where_TT, torch.finfo(torch.float32).min)


def matrix(scores_HTT: torch.Tensor) -> torch.Tensor:
    """(H, T, T) of what was found."""
    found = find_distance_bias(scores_HTT, None)
    assert found is not None
    return found.matrix(TIME, scores_HTT)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("added", [0.0, 2.5])
def test_scores_that_are_all_alike_are_no_bias(heads, added):
    for scores_HTT in (
        torch.full((heads, TIME, TIME), added),
        hidden(LATER_TT, torch.full((heads, TIME, TIME), added)),
    ):
        found = find_distance_bias(scores_HTT, None)
        assert found is not None
        assert found.is_nothing()
        assert matrix(scores_HTT).shape == (heads, TIME, TIME)


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_look_ahead_is_no_causal_mask(ahead):
    scores_HTT = hidden(DISTANCE_TT.lt(-ahead), torch.zeros(2, TIME, TIME))
    assert torch.equal(matrix(scores_HTT), torch.where(DISTANCE_TT.lt(-ahead), HIDDEN, 0.0).expand(2, -1, -1))


def test_a_window_hides_what_is_far_behind():
    seen_TT = (DISTANCE_TT >= 0) & (DISTANCE_TT < 4)
    found_HTT = matrix(hidden(~seen_TT, torch.zeros(1, TIME, TIME)))
    assert torch.equal(found_HTT[:, ~LATER_TT], torch.where(seen_TT, 0.0, HIDDEN)[None, ~LATER_TT])


def test_slopes_are_each_heads_own_and_what_a_row_shares_cancels():
    slope_H11 = torch.tensor([0.5, 0.125]).view(2, 1, 1)
    bias_HTT = -slope_H11 * DISTANCE_TT
    found_HTT = matrix(hidden(LATER_TT, bias_HTT + torch.linspace(-3, 3, TIME)[:, None]))
    torch.testing.assert_close(found_HTT[:, ~LATER_TT], bias_HTT[:, ~LATER_TT])


def test_a_table_is_read_in_both_directions():
    table = torch.tensor([0.0, 0.7, -0.2, 1.1])
    bias_TT = torch.where(LATER_TT, -2 * table[(-DISTANCE_TT).clamp(0, 3)], table[DISTANCE_TT.clamp(0, 3)])
    torch.testing.assert_close(matrix(bias_TT[None]), bias_TT[None])
    found = find_distance_bias(bias_TT[None], None)
    assert found is not None
    assert found.sizes == [4, 4]
    assert not any(reach.slope_H.any() for reach in found)


def test_what_is_no_matter_of_distance_is_none():
    bias_TT = torch.zeros(TIME, TIME)
    bias_TT[7, 3] = 0.5
    assert find_distance_bias(bias_TT[None], None) is None
    assert find_distance_bias(hidden(LATER_TT, bias_TT[None]), None) is None
    assert find_distance_bias(hidden(DISTANCE_TT <= 0, torch.zeros(1, TIME, TIME)), None) is None  # its own step
    assert find_distance_bias(hidden(STEP_T == 5, torch.zeros(1, TIME, TIME)), None) is None


def test_where_more_lengths_can_be_had_a_table_is_read_to_its_end():
    def scores(length: int) -> torch.Tensor:
        step_T = torch.arange(length)
        return (step_T[:, None] - step_T).clamp(0, 20).float().sqrt()[None]

    asked: list[int] = []

    def at_length(length: int) -> torch.Tensor | None:
        asked.append(length)
        return scores(length) if length <= 128 else None

    found = find_distance_bias(scores(TIME), at_length)
    assert found is not None
    torch.testing.assert_close(found.matrix(60, torch.zeros(1)), scores(60))
    assert asked == [512, 256, 128]
    assert find_distance_bias(scores(TIME), lambda length: None) is None  # its end isn't known
