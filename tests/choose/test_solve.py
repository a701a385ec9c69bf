"""The knapsack, against every choice tried by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thesean.choose.solve import Budget, solve


def test_the_cheapest_loss_that_fits_is_found():
    losses = [[0.0, 1.0], [0.0, 3.0]]
    costs = [[0.0, -2.0], [0.0, -2.0]]
    assert solve(losses, [Budget(costs=costs, bound=-2.0)]) == [(1, 0)]
    assert solve(losses, [Budget(costs=costs, bound=-4.0)]) == [(1, 1)]
    assert solve(losses, [Budget(costs=costs, bound=0.0)]) == [(0, 0)]


def test_nothing_is_found_where_nothing_fits():
    assert solve([[0.0, 1.0]], [Budget(costs=[[0.0, -2.0]], bound=-3.0)]) == []


def test_the_next_best_choices_follow():
    losses = [[0.0, 1.0], [0.0, 3.0]]
    assert solve(losses, [], count=9) == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_budgets_of_very_different_units_all_hold():
    losses = [[0.0, 1.0, 2.0]] * 2
    params = Budget(costs=[[0.0, -1e9, -2e9]] * 2, bound=-2.5e9)
    latency = Budget(costs=[[0.0, -0.001, 0.0]] * 2, bound=-0.0005)
    assert solve(losses, [params, latency]) in ([(1, 2)], [(2, 1)])


numbers = st.integers(0, 20)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3), min_size=1, max_size=4), numbers)
def test_the_best_of_all_choices(parts, bound):
    losses = [[float(loss) for loss, _ in row] for row in parts]
    costs = [[float(cost) for _, cost in row] for row in parts]
    fitting = [
        sum(row[c] for row, c in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(row)) for row in parts))
        if sum(row[c] for row, c in zip(costs, choice, strict=True)) <= bound
    ]
    found = solve(losses, [Budget(costs=costs, bound=bound)])
    assert bool(found) == bool(fitting)
    if found:
        total = sum(row[c] for row, c in zip(losses, found[0], strict=True))
        assert total == pytest.approx(min(fitting))
