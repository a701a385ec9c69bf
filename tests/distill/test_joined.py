"""N rows, T time, D width"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thesean.distill import joined as module
from thesean.distill.joined import Given, joined


def given(number: int, rows: int, width: int = 2, masks: Sequence[torch.Tensor | None] = (None, None)) -> Given:
    x, target, residual = (torch.full((rows, 3, width), float(10 * number + k)) for k in range(3))
    return Given((number,), (rows,), x, target, residual, *masks)


def numbers(givens: Sequence[Given], apart: bool = False) -> list[tuple[int, ...]]:
    return [some.numbers for some in joined(givens, apart)]


def test_neighbours_of_one_shape_are_read_as_one_in_their_order():
    (both,) = joined([given(0, 4), given(1, 2)])
    assert (both.numbers, both.sizes) == ((0, 1), (4, 2))
    for k, tensor in enumerate(both.tensors):
        assert tensor.shape == (6, 3, 2)
        assert tensor[:, 0, 0].tolist() == [k] * 4 + [10 + k] * 2
    assert both.first(6 * 3) == 4 * 3  # rows that count: the tokens of the first batch
    assert list(joined([])) == []


def test_other_shapes_begin_anew_and_nothing_is_left_out():
    rows = [given(0, 4), given(1, 4, width=5), given(2, 1, width=5), given(3, 4)]
    assert numbers(rows) == [(0,), (1, 2), (3,)]
    assert numbers(rows, apart=True) == [(0,), (1,), (2,), (3,)]
    for shape in ((4, 3, 7), (4, 5, 2)):
        odd = given(1, 4)._replace(residual=torch.zeros(shape))
        assert numbers([given(0, 4), odd]) == [(0,), (1,)]


def test_what_hides_steps_is_read_by_itself():
    mask_BT = torch.ones(4, 3, dtype=torch.bool)
    for masks in ((mask_BT, None), (None, mask_BT)):
        hiding = given(1, 4, masks=masks)
        found = list(joined([given(0, 4), hiding, given(2, 4)]))
        assert [some.numbers for some in found] == [(0,), (1,), (2,)]
        assert found[1] is hiding


def test_as_many_are_read_at_once_as_are_small_together(monkeypatch):
    rows = [given(k, 2) for k in range(5)]
    monkeypatch.setattr(module, "_MOST", 2 * 2 * 3 * 2)  # numbers in two of them
    assert numbers(rows) == [(0, 1), (2, 3), (4,)]
    monkeypatch.setattr(module, "_MOST", 2 * 2 * 3 * 2 - 1)
    assert numbers(rows) == [(0,), (1,), (2,), (3,), (4,)]
