from __future__ import annotations

import math

import pytest

from thesean.distill import course
from thesean.distill.course import Course


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(course.time, "monotonic", own)
    return own


@pytest.mark.parametrize(("pace", "steps"), [(1.0, 50), (2.0, 25), (0.5, 100), (20.0, 5)])
def test_as_many_steps_are_counted_as_fit_at_the_pace_so_far(clock: Clock, pace: float, steps: int):
    planned = Course(30, clock.now + 50)
    planned.resumed(0)
    clock.now += 5 * pace
    planned.count(5)
    assert planned.steps == max(5, steps)


def test_without_an_end_it_is_the_number_that_was_said(clock: Clock):
    planned = Course(30)
    planned.resumed(0)
    clock.now += 1000
    planned.count(5)
    assert (planned.steps, planned.ends) == (30, math.inf)


def test_none_is_added_once_the_time_is_up(clock: Clock):
    planned = Course(30, clock.now + 10)
    planned.resumed(0)
    clock.now += 12
    planned.count(6)
    assert planned.steps == 6


def test_what_was_taken_before_an_interruption_says_nothing_of_the_pace(clock: Clock):
    planned = Course(1, clock.now + 1000)
    planned.load_state_dict(Course(40).state_dict())
    planned.ends = clock.now + 20
    planned.resumed(10)
    assert planned.steps == 40
    planned.count(10)
    assert planned.steps == 40  # nothing to count by
    clock.now += 10
    planned.count(15)
    assert planned.steps == 20
