"""B batch, T time, D width, L layers"""

from __future__ import annotations

import pytest
import torch

from thesean.errors import DataError
from thesean.passes.capture.dynamic import at_least_two, check_dynamic, guess_dynamic


def floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


BOTH, BATCH = {0: "batch", 1: "time"}, {0: "batch"}

GUESSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]] = {
    "a text": ({"x": ids(3, 5)}, {"x": BOTH}),
    "hidden states": ({"x": floats(3, 5, 8)}, {"x": BOTH}),
    "features": ({"x": floats(3, 5)}, {"x": BATCH}),
    "an image": ({"x": floats(3, 1, 8, 8)}, {"x": BATCH}),
    "labels": ({"x": ids(3)}, {"x": BATCH}),
    "whole numbers of an image": ({"x": ids(3, 8, 8)}, {"x": BATCH}),
    "a number": ({"x": ids()}, {"x": {}}),
    "a mask of floats beside a text": ({"x": ids(3, 5), "mask": floats(3, 5)}, {"x": BOTH, "mask": BOTH}),
    "a mask of floats beside hidden states": ({"mask": floats(3, 5), "x": floats(3, 5, 8)}, {"x": BOTH, "mask": BOTH}),
    "features beside a text": ({"x": ids(3, 5), "more": floats(3, 4)}, {"x": BOTH, "more": BATCH}),
    "a state": ({"x": floats(3, 5, 8), "state": floats(2, 3, 6)}, {"x": BOTH, "state": {1: "batch"}}),
    "a state of as many layers as rows": ({"x": floats(3, 5, 8), "state": floats(3, 3, 6)}, {"x": BOTH, "state": BOTH}),
    "one row for a whole batch": ({"x": ids(3, 5), "places": ids(1, 5)}, {"x": BOTH, "places": {1: "time"}}),
    "one row, which is the batch": ({"x": ids(1, 5), "more": floats(1, 4)}, {"x": BOTH, "more": BATCH}),
    "bags of words": ({"words": ids(9), "offsets": ids(3)}, {"words": BATCH, "offsets": BATCH}),
    "two, whose second is not the batch": ({"x": ids(3, 5), "y": floats(7, 3)}, {"x": BOTH, "y": BATCH}),
    "a number before a text": ({"scale": floats(), "x": ids(3, 5)}, {"scale": {}, "x": BOTH}),
    "pairs of steps": ({"x": ids(3, 5), "mask": floats(5, 5)}, {"x": BOTH, "mask": {0: "time", 1: "time"}}),
    "pairs of steps, and one row of them": (
        {"x": floats(3, 5, 8), "pairs": floats(3, 1, 5, 5), "keys": floats(3, 1, 1, 5)},
        {"x": BOTH, "pairs": BATCH | {2: "time", 3: "time"}, "keys": BATCH | {3: "time"}},
    ),
    "numbers of pairs, which may be features": ({"x": ids(3, 5), "y": floats(5, 5) + 2}, {"x": BOTH, "y": BATCH}),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSED)
def test_batch_and_time_are_guessed_from_shapes_and_dtypes(name):
    inputs, free = GUESSED[name]
    assert guess_dynamic(inputs, sequence=True) == free
    less = {k: {d: n for d, n in dims.items() if n == "batch"} for k, dims in free.items()}
    assert guess_dynamic(inputs, sequence=False) == less


def test_what_the_caller_leaves_out_is_fixed():
    given = check_dynamic({"x": {2: "width"}}, {"x": floats(3, 5, 8), "y": floats(3)})
    assert given == {"x": {2: "width"}, "y": {}}


@pytest.mark.parametrize(
    ("dynamic", "reason"),
    [
        ({"y": {0: "batch"}}, "the guide has no input 'y'"),
        ({"x": {2: "time"}}, r"'x' has dimensions 0 to 1 \(shape \(3, 5\)\), found 2"),
        ({"x": {-1: "time"}}, r"'x' has dimensions 0 to 1 \(shape \(3, 5\)\), found -1"),
        ({"x": {"time": 1}}, r"'x' has dimensions 0 to 1 \(shape \(3, 5\)\), found 'time'"),
        ({"x": {1: "two words"}}, r"expected a name such as .* for x\[1\], found 'two words'"),
        ({"x": {1: None}}, r"expected a name such as .* for x\[1\], found None"),
    ],
)
def test_what_the_inputs_do_not_have_is_refused(dynamic, reason):
    with pytest.raises(DataError, match=reason):
        check_dynamic(dynamic, {"x": ids(3, 5)})


def test_a_free_size_of_one_is_doubled_and_no_other():
    x_BTD = torch.randn(1, 1, 1)
    assert at_least_two(x_BTD, {0: "batch", 1: "time"}).shape == (2, 2, 1)
    x_BTD = torch.randn(1, 3, 2)
    torch.testing.assert_close(at_least_two(x_BTD, {0: "batch", 1: "time"}), torch.cat([x_BTD, x_BTD]))
    assert at_least_two(x_BTD, {1: "time"}) is x_BTD
    number = torch.tensor(1)
    assert at_least_two(number, {}) is number
