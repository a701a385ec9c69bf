"""What inputs of other sizes keep of the example, whatever its kind and whichever of its dimensions are free.

B batch, T time, D width
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from thesean.passes.graph.resample import (
    all_shown,
    along_diagonals,
    in_a_row,
    is_mask,
    is_of_pairs,
    kept_example,
    resampled,
    sizes_of,
)

SHAPES: list[tuple[int | str, ...]] = [
    ("b", "t", 3), ("t", "b", 3), (3, "b", "t"), ("b", 3, "t"), ("b", 3), (2, "b", 3), ("b",), ("b", "t"),
    ("t", 2, "b"),
]  # fmt: skip
HAVE = {"b": 4, "t": 6}


def drawn(shape: tuple[int | str, ...], sizes: dict[str, int], seed: int = 0) -> torch.Tensor:
    given = [sizes[d] if isinstance(d, str) else d for d in shape]
    return torch.randn(given, generator=torch.Generator().manual_seed(seed))


def made(example: torch.Tensor, shape: Any, sizes: dict[str, int], seed: int = 0, **settings: Any) -> torch.Tensor:
    return resampled(example, shape, sizes, HAVE, torch.Generator().manual_seed(seed), **settings)


def rows_of(x: torch.Tensor, shape: tuple[int | str, ...]) -> Counter[tuple[float, ...]]:
    """What stands at each place of the free dimensions, and how often."""
    free = [at for at, d in enumerate(shape) if isinstance(d, str)]
    static = [at for at in range(x.ndim) if at not in free]
    flat = x.permute([*free, *static]).reshape(-1, *(x.shape[at] for at in static)).flatten(1 if static else 0)
    return Counter(tuple(row) if isinstance(row, list) else (row,) for row in flat.tolist())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [HAVE, {"b": 5, "t": 7}, {"b": 1, "t": 1}, {"b": 8, "t": 12}, {"b": 3, "t": 2}])
def test_many_numbers_are_the_examples_each_as_often_as_any_other(shape, sizes):
    have = {"b": 20, "t": 20}
    example = drawn(shape, have)
    y = made(example, shape, sizes)
    assert y.shape == drawn(shape, sizes).shape
    assert y.dtype == example.dtype
    before, found = rows_of(example, shape), rows_of(y, shape)
    assert set(found) <= set(before)
    often = Counter(found.values())
    assert max(often) - (min(often) if sum(found.values()) >= sum(before.values()) else 1) <= 1
    assert torch.equal(made(example, shape, sizes), y)
    assert y.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_few_numbers_are_drawn_around_within_each_columns_range(shape):
    have = {"b": 3, "t": 3}
    example = drawn(shape, have) - 10 * torch.arange(drawn(shape, have).shape[0]).view(-1, *[1] * (len(shape) - 1))
    y = made(example, shape, {"b": 9, "t": 9}, fresh=True)
    free = [at for at, d in enumerate(shape) if isinstance(d, str)]
    if len(free) == 2:
        assert (y >= example.amin(free, keepdim=True)).all()
        assert (y <= example.amax(free, keepdim=True)).all()
    assert y.min() >= example.min()
    assert y.max() <= example.max()
    assert len(y.unique()) > len(example.unique()) or y.numel() <= 9


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_what_rises_goes_on_by_its_last_step_and_what_does_not_is_picked(dtype):
    rising = torch.tensor([[0, 1, 3, 6], [5, 5, 5, 9]]).to(dtype)
    for time in (1, 2, 4, 5, 9):
        y = made(rising, ("b", "t"), {"b": 3, "t": time}, high=100 if dtype == torch.int64 else None)
        whole = torch.cat([rising, rising[:, -1:] + torch.tensor([[3], [4]]) * torch.arange(1, 6)], 1).to(dtype)
        assert torch.equal(y, whole[[0, 1, 0], :time])
    if dtype == torch.int64:
        for other in ([[0, 1]], [[3, 2, 1]], [[4, 4, 4]], [[0, 1, 2], [7, 7, 7]], [[0, 2, 1]]):
            y = made(torch.tensor(other), ("b", "t"), {"b": 2, "t": 9}, high=50)
            assert not torch.equal(y[0], torch.arange(9) + y[0, 0])
            assert y.max() < 50


def test_a_number_that_rises_along_what_is_not_free_is_no_position():
    example = torch.arange(12).view(4, 3)
    y = made(example, ("b", 3), {"b": 9}, high=20)
    assert set(map(tuple, y.tolist())) == set(map(tuple, example.tolist()))


@pytest.mark.parametrize("shape", [("b", "t"), ("b", "t", 3), ("t", "b", 3), (2, "b", "t"), ("b", 2, "t")])
@pytest.mark.parametrize(("rows", "steps"), [(1, 3), (4, 6), (5, 13), (2, 30)])
def test_sequences_follow_one_another_from_a_row_of_their_own(shape, rows, steps):
    sizes = {"b": rows, "t": steps}
    example = torch.randint(2, 90, drawn(shape, HAVE).shape, generator=torch.Generator().manual_seed(1))
    y = in_a_row(example, shape, sizes)
    assert y is not None
    assert y.shape == drawn(shape, sizes).shape
    free = [at for at, d in enumerate(shape) if isinstance(d, str)]
    x_first, y_first = (z.movedim(free, (0, 1)) for z in (example, y))
    have, long = x_first.shape[:2]
    for row, step in itertools.product(range(y_first.shape[0]), range(y_first.shape[1])):
        at = (row * long + step) % (have * long)
        assert torch.equal(y_first[row, step], x_first[at // long, at % long])


@pytest.mark.parametrize(
    ("example", "shape"),
    [
        (torch.randn(4, 6, 3), ("b", 6, 3)),
        (torch.randn(4, 6, 5), ("b", "t", "s")),
        (torch.arange(6).expand(4, 6), ("b", "t")),
        (torch.ones(4, 6, dtype=torch.int64), ("b", "t")),
        (torch.randn(0, 6), ("b", "t")),
    ],
)
def test_what_is_no_sequence_of_the_callers_does_not_follow(example, shape):
    assert in_a_row(example, shape, {"b": 2, "t": 3, "s": 3}) is None


@pytest.mark.parametrize("wanted", [1, 4, 5, 6, 9])
def test_a_mask_of_pairs_goes_on_along_its_diagonals(wanted):
    by_distance = torch.randn(2, 1, 19, generator=torch.Generator().manual_seed(0))
    age_TT = torch.arange(9).unsqueeze(1) - torch.arange(9)
    whole = by_distance[..., age_TT + 9]  # (2, 1, 9, 9)
    y = along_diagonals(whole[..., :5, :5], [3, 1, wanted, wanted])
    known = age_TT[:wanted, :wanted].abs() < 5
    assert torch.equal(y[..., known], whole[[0, 1, 0]][..., :wanted, :wanted][..., known])
    far = age_TT[:wanted, :wanted] >= 5  # as at the first step
    assert torch.equal(y[..., far], y[..., 4:5, 0].expand(y[..., far].shape) if wanted > 4 else y[..., far])
    any_ = torch.randn(5, 5)
    assert torch.equal(along_diagonals(any_, [wanted, wanted])[:5, :5], any_[:wanted, :wanted])


def test_pairs_are_of_one_length():
    assert all(map(is_of_pairs, [("t", "t"), ("b", 1, "t", "t")]))
    assert not any(map(is_of_pairs, [("t",), ("b", "t"), (3, 3), ("t", "t", 3), ("t", 3), ()]))


def test_flags_and_ones_and_zeros_are_masks():
    for example, mask in (
        (torch.tensor([True, False]), True),
        (torch.tensor([1, 0, 1]), True),
        (torch.tensor([0, 2]), False),
        (torch.tensor([1.0, 0.0]), True),
        (torch.tensor([0.0, -1.0]), False),
    ):
        assert is_mask(example) == mask


BOOLEANS: list[tuple[list[list[int]], bool]] = [
    ([[1, 1, 1], [1, 0, 0]], True),  # the first is seen in all rows
    ([[0, 0, 1], [1, 1, 1]], True),
    ([[0, 0, 0], [0, 1, 1]], False),  # "is padding"
    ([[1, 1, 0], [0, 0, 0]], False),
    ([[1, 1, 1], [1, 1, 1]], True),
    ([[0, 0, 0], [0, 0, 0]], False),
    ([[1, 0, 1], [0, 1, 0]], True),  # half of it
    ([[1, 0, 0], [0, 0, 0]], False),
    ([[1, 0, 0], [1, 1, 0]], True),  # both ends tell: most
    ([[1, 0, 0], [1, 0, 0]], False),
]


@pytest.mark.parametrize(("rows", "shown"), BOOLEANS)
def test_a_mask_of_booleans_shows_all_as_it_shows_what_is_never_padding(rows, shown):
    mask = torch.tensor(rows, dtype=torch.bool)
    assert torch.equal(made(mask, ("b", "t"), {"b": 3, "t": 5}), torch.full((3, 5), shown))
    assert torch.equal(all_shown(mask.float(), [3, 5]), torch.full((3, 5), float(shown)))
    whole = mask.long()
    assert torch.equal(made(whole, ("b", "t"), {"b": 3, "t": 5}), torch.ones(3, 5, dtype=torch.int64))
    added = torch.where(mask, 0.0, -1e9)
    assert torch.equal(all_shown(added, [3, 5]), torch.zeros(3, 5))


def test_one_mask_for_all_dimensions_of_its_own_is_picked_by_row():
    mask_B3 = torch.tensor([[True, False, True], [False, False, True]])
    y = made(mask_B3, ("b", 3), {"b": 9})
    assert set(map(tuple, y.tolist())) == set(map(tuple, mask_B3.tolist()))


@pytest.mark.parametrize("fresh", [False, True])
def test_indices_are_in_their_table_whatever_the_example_holds(fresh):
    for low, top in ((3, 9), (0, 49), (7, 7), (-2, 9), (5, 50), (49, 49)):
        example = torch.randint(low, top + 1, (4, 6), generator=torch.Generator().manual_seed(0))
        example[0, 0], example[0, 1] = low, top
        y = made(example, ("b", "t"), {"b": 40, "t": 50}, high=50, fresh=fresh)
        inside = 0 <= low < top < 50 and not fresh
        assert (int(y.min()), int(y.max())) == ((low, top) if inside else (0, 49))


def test_what_is_kept_of_an_example_is_its_first_rows_where_it_is_large():
    small, large = torch.randn(9, 64), torch.randn(9, 2**15)
    for value, batch, rows in ((small, 0, 9), (large, 0, 4), (large, None, 9), (large.T, 1, 4), (large[:3], 0, 3)):
        kept = kept_example(value, batch)
        assert torch.equal(kept, value if batch is None else value.narrow(batch, 0, rows))
        assert kept.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
        assert not kept.requires_grad
    exactly = torch.zeros(8, 2**15)  # 2**20 bytes
    assert kept_example(exactly, 0).shape == exactly.shape


def test_sizes_are_the_largest_of_each_name():
    shapes = [(("b", "t", 3), torch.zeros(2, 6, 3)), (("b", 9), torch.zeros(4, 9)), ((5, "t"), torch.zeros(5, 1))]
    assert sizes_of(shapes) == {"b": 4, "t": 6}
    assert sizes_of([]) == {}


LENGTHS: list[tuple[list[int], int, list[int]]] = [
    ([6, 3, 1], 6, [6, 3, 1]),
    ([6, 3, 1], 3, [3, 2, 1]),  # rounded up
    ([6, 3, 1], 1, [1, 1, 1]),
    ([6, 3, 1], 12, [6, 3, 1]),
    ([5, 2, 0], 3, [2, 1, 0]),  # what never reaches the end is an index
    ([5, 2, 0], 1, [0, 0, 0]),
    ([9, 2, 0], 3, [9, 2, 0]),  # counts nothing that is known
    ([-1, 6, 2], 3, [-1, 6, 2]),
]


@pytest.mark.parametrize(("lengths", "time", "want"), LENGTHS)
def test_lengths_and_indices_shrink_with_what_they_count(lengths, time, want):
    y = resampled(
        torch.tensor(lengths), ("b",), {"b": 30, "t": time}, {"b": 3, "t": 6}, torch.Generator().manual_seed(0)
    )  # fmt: skip
    assert set(y.tolist()) == set(want)


def test_nothing_is_made_of_nothing():
    for example in (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.bool)):
        y = made(example, ("b", 3), {"b": 2})
        assert torch.equal(y, torch.zeros(2, 3).to(example.dtype))
    assert made(torch.randn(4, 3), ("b", 3), {"b": 0}).shape == (0, 3)


def test_infinities_and_complex_numbers_are_picked():
    x = torch.tensor([[0.5, -torch.inf], [1.5, 2.0], [0.25, 1.0]])
    assert set(map(tuple, made(x, ("b", 2), {"b": 9}, fresh=True).tolist())) == set(map(tuple, x.tolist()))
    z = torch.complex(torch.randn(3, 2), torch.randn(3, 2))
    assert set(map(tuple, made(z, ("b", 2), {"b": 9}, fresh=True).tolist())) == set(map(tuple, z.tolist()))
