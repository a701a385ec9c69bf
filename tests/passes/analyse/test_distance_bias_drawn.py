"""Biases of distance that are drawn, read back from the scores that they make at the lengths that are asked for.

T time, H heads, D distances
"""

from __future__ import annotations

import random

import pytest
import torch

from thesean.passes.analyse.distance_bias import find_distance_bias
from thesean.targets.shared.distance_bias import HIDDEN, DistanceBias, Reach

TIME = 12


def drawn(seed: int) -> tuple[DistanceBias, int | None]:
    """Tables of any size, with lines behind them or without; and a window, or none."""
    generator, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    heads = generator.choice([1, 2, 3])

    def reach() -> Reach:
        table_HD = torch.randn(heads, generator.randint(1, 20), generator=numbers)
        slope_H = -torch.rand(heads, generator=numbers) * generator.choice([0, 1])
        return Reach(torch.cat([torch.zeros(heads, 1), table_HD[:, 1:]], 1), slope_H)

    return DistanceBias(reach(), reach()), generator.choice([None, None, 3, 30])


def scores_of(bias: DistanceBias, causal: bool, window: int | None, time: int) -> torch.Tensor:
    """(H, T, T) with hidden keys far down, each row with a constant of its own."""
    step_T = torch.arange(time)
    age_TT = step_T.unsqueeze(1) - step_T
    hidden_TT = (age_TT < 0) & causal | (age_TT >= (time if window is None else window))
    shared_T1 = torch.linspace(-2, 2, time).unsqueeze(1)
    return (bias.matrix(time, torch.zeros(1)) + shared_T1).masked_fill(hidden_TT, -1e9)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_is_read_back_at_lengths_that_were_not_looked_at(seed, causal):
    bias, window = drawn(seed)
    found = find_distance_bias(
        scores_of(bias, causal, window, TIME),
        lambda time: scores_of(bias, causal, window, time) if time <= 128 else None,
    )
    assert found is not None
    assert len(found.behind.slope_H) == len(bias.behind.slope_H)
    want_HTT = scores_of(bias, causal, window, 200)
    want_HTT = want_HTT - want_HTT.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    got_HTT = found.matrix(200, torch.zeros(1))
    age_TT = torch.arange(200).unsqueeze(1) - torch.arange(200)
    known_TT = (age_TT >= 0) | torch.tensor(not causal)
    torch.testing.assert_close(
        got_HTT[:, known_TT], want_HTT.clamp_min(HIDDEN)[:, known_TT], rtol=1e-4, atol=1e-4
    )  # fmt: skip
    assert not causal or not any(t.any() for t in found.ahead)


@pytest.mark.parametrize("seed", range(8))
def test_a_bias_that_one_score_departs_from_is_none(seed):
    bias, _ = drawn(seed)
    scores_HTT = scores_of(bias, True, None, TIME)
    at = random.Random(seed)
    query = at.randint(3, TIME - 2)
    scores_HTT[-1, query, at.randint(1, query - 1)] += 0.01
    assert find_distance_bias(scores_HTT, None) is None
    assert find_distance_bias(scores_of(bias, True, None, TIME), lambda time: scores_HTT) is None


@pytest.mark.parametrize(
    ("heads", "time", "asked"),
    [
        (1, 12, [512, 256, 128, 64, 32]),
        (16, 12, [512, 256, 128, 64, 32]),
        (17, 12, [256, 128, 64, 32]),
        (64, 12, [256, 128, 64, 32]),
        (65, 12, [128, 64, 32]),
        (5000, 12, [32]),
        (1, 40, [512, 256, 128, 64]),
        (1, 64, [512, 256, 128]),
        (1, 600, []),
    ],
)
def test_the_longest_length_is_asked_for_that_so_many_different_heads_allow(heads, time, asked):
    found: list[int] = []

    def none(length: int) -> None:
        found.append(length)

    age_TT = (torch.arange(time).unsqueeze(1) - torch.arange(time)).abs()
    slope_H11 = 1.0 + torch.arange(heads).view(-1, 1, 1) / heads
    line = find_distance_bias(-slope_H11 * age_TT, none)
    assert line is not None  # it shows already
    assert found == asked


def test_heads_that_are_alike_count_once():
    found: list[int] = []
    age_TT = (torch.arange(TIME).unsqueeze(1) - torch.arange(TIME)).abs().float()
    find_distance_bias(-age_TT.expand(400, -1, -1), found.append)
    assert found[0] == 512


def test_a_longer_length_is_asked_for_until_a_table_ends_within_half_of_it():
    def asked(size: int) -> list[int]:
        found: list[int] = []

        def scores(length: int) -> torch.Tensor:
            found.append(length)
            age_TT = torch.arange(length).unsqueeze(1) - torch.arange(length)
            return age_TT.clamp(0, size - 1).float().sqrt()[None]

        bias = find_distance_bias(scores(TIME), scores)
        assert bias is not None
        assert bias.behind.table_HD.shape[1] == min(size, found[-1])
        return found[1:]

    assert asked(20) == asked(256) == [512]
    assert asked(257) == [512, 1024]


def test_a_slope_is_that_of_the_whole_line():
    age_TT = torch.arange(TIME).unsqueeze(1) - torch.arange(TIME)
    found = find_distance_bias((-0.1 * age_TT + 3e-6 * (age_TT % 2))[None], None)
    assert found is not None
    assert found.behind.slope_H.item() == pytest.approx(-0.1, rel=1e-5)
    assert found.sizes == [1, 1]


def test_a_line_that_bends_by_less_than_a_step_shows_is_no_line():
    def scores(length: int) -> torch.Tensor:
        age_TT = torch.arange(length).unsqueeze(1) - torch.arange(length)
        return (-0.1 * age_TT - 2e-7 * age_TT * age_TT.abs()).float()[None]

    found = find_distance_bias(scores(TIME), lambda length: scores(length) if length <= 512 else None)
    assert found is not None
    assert found.behind.table_HD.shape[1] > 1
    torch.testing.assert_close(found.matrix(512, torch.zeros(1)), scores(512), rtol=0, atol=1e-3)
