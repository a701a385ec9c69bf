"""B batch, T time, V what a step holds, P places"""

from __future__ import annotations

import pytest
import torch

from thesean.targets.shared.steps import Steps
from thesean.targets.shared.taps import Taps

VALUE_BTV = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])


def rows(taps_BTE: torch.Tensor) -> list[list[float]]:
    return taps_BTE[0].tolist()


def test_the_last_values_stand_side_by_side_the_own_one_first():
    taps = Taps(count=3)
    tapped, (past_BPV,) = taps(VALUE_BTV, taps.initial_state(VALUE_BTV, 1))
    assert rows(tapped) == [[1, 0, 0], [2, 1, 0], [3, 2, 1], [4, 3, 2]]
    assert past_BPV.flatten().tolist() == [3, 4]


def test_a_past_goes_on_where_it_ended():
    taps = Taps(count=3)
    first, past = taps(VALUE_BTV[:, :1], taps.initial_state(VALUE_BTV, 1))
    second, _ = taps(VALUE_BTV[:, 1:], past)
    assert rows(torch.cat([first, second], 1)) == [[1, 0, 0], [2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_asked_late_they_are_of_the_steps_since_too():
    taps = Taps(count=2, ahead=1)
    tapped, (past_BPV,) = taps(VALUE_BTV, taps.initial_state(VALUE_BTV, 1))
    # for the step before: the one after it, its own, the one before
    assert rows(tapped)[1:] == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    assert past_BPV.flatten().tolist() == [3, 4]


def test_both_ways_they_reach_as_far_ahead_and_carry_nothing():
    taps = Taps(count=2, both_ways=True)
    assert taps.initial_state(VALUE_BTV, 1) == ()
    tapped, past = taps(VALUE_BTV, ())
    assert rows(tapped) == [[2, 1, 0], [3, 2, 1], [4, 3, 2], [0, 4, 3]]
    assert past == ()
    tapped, _ = Taps(count=3, both_ways=True)(VALUE_BTV, ())
    assert rows(tapped)[1:3] == [[4, 3, 2, 1, 0], [0, 4, 3, 2, 1]]


def test_one_tap_is_the_value_and_needs_no_past():
    taps = Taps(count=1)
    tapped, past = taps(VALUE_BTV, taps.initial_state(VALUE_BTV, 1))
    assert tapped is VALUE_BTV
    assert past == ()


@pytest.mark.parametrize(("seen", "kept"), [([1, 1, 0, 0], [1, 2]), ([1, 0, 0, 0], [0, 1]), ([0, 0, 0, 0], [0, 0])])
def test_hidden_steps_leave_the_past_alone(seen, kept):
    taps, steps = Taps(count=3), Steps(torch.tensor([seen], dtype=torch.bool))
    _, (past_BPV,) = taps(steps.hide(VALUE_BTV), taps.initial_state(VALUE_BTV, 1), steps)
    assert past_BPV.flatten().tolist() == kept
