"""H heads, D distances of a table, T time"""

from __future__ import annotations

import pytest
import torch

from thesean.targets.shared.distance_bias import DistanceBias, Reach, seen_from

TABLE_HD = torch.tensor([[5.0, 7.0, 11.0], [0.5, 0.0, -1.0]])
BEHIND = Reach(TABLE_HD, torch.tensor([-2.0, 0.25]))
AHEAD = Reach(-10 * TABLE_HD[:, :2], torch.tensor([3.0, -1.0]))


def value(head: int, distance: int) -> float:
    """Of a key so many steps behind its query."""
    table_HD, slope_H = BEHIND if distance >= 0 else AHEAD
    steps, last = abs(distance), table_HD.shape[1] - 1
    return float(table_HD[head, min(steps, last)] + slope_H[head] * max(0, steps - last))


def test_past_the_end_of_its_table_a_bias_goes_on_by_its_slope():
    found = BEHIND.of(torch.tensor([[0, 1, 2], [3, 4, 9]]))
    assert found.tolist() == [[[5, 7, 11], [9, 7, -3]], [[0.5, 0, -1], [-0.75, -0.5, 0.75]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_scores_are_biased_by_what_is_behind_and_at_the_own_step_and_by_what_is_ahead(dtype):
    bias_HTT = DistanceBias(BEHIND, AHEAD).matrix(6, torch.zeros(1, dtype=dtype))
    assert bias_HTT.dtype == dtype
    assert bias_HTT.tolist() == [[[value(h, q - k) for k in range(6)] for q in range(6)] for h in range(2)]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_a_query_that_waits_sees_what_was_ahead_of_it_behind(ahead):
    reach = seen_from(DistanceBias(BEHIND, AHEAD), ahead)
    found = reach.of(torch.arange(12))
    assert found.tolist() == [[value(h, d - ahead) for d in range(12)] for h in range(2)]


def test_heads_are_taken_with_their_tables_and_slopes():
    kept = DistanceBias(BEHIND, AHEAD).heads(torch.tensor([1]))
    for reach, whole in zip(kept, (BEHIND, AHEAD), strict=True):
        assert torch.equal(reach.table_HD, whole.table_HD[1:])
        assert torch.equal(reach.slope_H, whole.slope_H[1:])
    assert kept.sizes == [3, 2]


def test_a_bias_is_nothing_where_neither_a_table_nor_a_slope_says_anything():
    zeros = Reach(torch.zeros(2, 3), torch.zeros(2))
    assert DistanceBias(zeros, zeros).is_nothing()
    for some in (zeros._replace(slope_H=torch.tensor([0.0, 1.0])), zeros._replace(table_HD=TABLE_HD)):
        assert not DistanceBias(zeros, some).is_nothing()
        assert not DistanceBias(some, zeros).is_nothing()
