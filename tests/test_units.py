from __future__ import annotations

import math

import pytest

from thesean.units import decimal, duration, milliseconds, quantity, times


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (7, "", "7"),
        (999, "", "999"),
        (1_000, "", "1 k"),
        (1_234_567, "", "1.23 M"),
        (2 * 10**9, "", "2 G"),
        (3 * 10**12, "", "3 T"),
        (842_240, "", "842 k"),
        (999_999, "", "1 M"),
        (1_500_000_000, "FLOP", "1.5 GFLOP"),
        (3_412_345, "B", "3.41 MB"),
        (12, "B", "12 B"),
        (None, "B", "-"),
        (math.nan, "", "-"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "12.3 us"), (0.5, "0.5 ms"), (12.34, "12.3 ms"), (2500, "2.5 s"), (None, "-")]
)
def test_latencies_choose_their_unit(value: float | None, text: str) -> None:
    assert milliseconds(value) == text


@pytest.mark.parametrize(
    ("slow", "fast", "text"),
    [(1.0, 0.74, "1.35x"), (6.0, 1.0, "6x"), (241.0, 2.0, "120x"), (None, 1.0, ""), (1.0, None, "")],
)
def test_speed_is_told_in_times(slow: float | None, fast: float | None, text: str) -> None:
    assert times(slow, fast) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.24, "4.2 s"), (59.4, "59 s"), (59.7, "1 min"), (75, "1 min 15 s"), (120, "2 min"), (4000, "1 h 7 min")],
)
def test_durations_read_as_people_say_them(value: float, text: str) -> None:
    assert duration(value) == text


def test_decimals_keep_their_places() -> None:
    assert decimal(1.4) == "1.4000"
    assert decimal(None) == "-"
