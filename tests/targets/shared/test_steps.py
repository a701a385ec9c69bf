"""B batch, T time, W rows that a window holds"""

from __future__ import annotations

import pytest
import torch

from thesean.targets.shared.steps import Steps, flip, hide, last

MASK_BT = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
STEPS = Steps(MASK_BT)
ROWS_BT = torch.arange(1.0, 21.0).view(4, 5)


def tokens(row: int) -> list[float]:
    return ROWS_BT[row][MASK_BT[row]].tolist()


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2), (4, 5, 2, 3)])
def test_tokens_come_to_the_front_in_their_order_and_back_to_their_places(shape):
    x_BTX = ROWS_BT.view(4, 5, *(1,) * (len(shape) - 2)).expand(shape)
    front = STEPS.to_front(x_BTX)
    assert front.shape == shape
    for row in range(4):
        assert front[row].reshape(5, -1)[: len(tokens(row)), 0].tolist() == tokens(row)
        assert sorted(front[row].reshape(5, -1)[:, 0].tolist()) == ROWS_BT[row].tolist()  # nothing is lost
    seen_BTX = MASK_BT.view(4, 5, *(1,) * (len(shape) - 2))
    assert torch.equal(STEPS.back(front), x_BTX * seen_BTX)
    assert STEPS.count_B.tolist() == [3, 2, 0, 5]
    assert STEPS.seen_BT.sum(1).tolist() == [3, 2, 0, 5]


def test_what_is_hidden_is_zero_or_what_is_asked_for():
    front = STEPS.to_front(ROWS_BT)
    for value in (0.0, -7.0):
        hidden = hide(front, STEPS, value)
        assert [row.tolist() for row in hidden] == [tokens(k) + [value] * (5 - len(tokens(k))) for k in range(4)]
    assert hide(front, None) is front


def test_time_is_reversed_up_to_the_last_token():
    front = STEPS.to_front(ROWS_BT)
    found = flip(front, STEPS)
    for row in range(4):
        count = len(tokens(row))
        assert found[row, :count].tolist() == tokens(row)[::-1]
        assert torch.equal(found[row, count:], front[row, count:])
    assert torch.equal(flip(found, STEPS), front)
    assert torch.equal(flip(front, None), front.flip(1))


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_window_and_a_state_hold_what_is_up_to_the_last_token(size):
    past_BW = -torch.arange(1.0, 4 * size + 1).view(4, size)
    all_BS = torch.cat([past_BW, STEPS.to_front(ROWS_BT)], 1)
    found = last(all_BS, size, STEPS)
    for row in range(4):
        assert found[row].tolist() == (past_BW[row].tolist() + tokens(row))[-size:]
    assert torch.equal(last(all_BS, size, None), all_BS[:, -size:])


def test_a_row_without_a_token_keeps_its_state_in_its_own_dtype():
    before_BE, hidden_BTE = torch.full((4, 1), -1.0, dtype=torch.float64), STEPS.to_front(ROWS_BT).unsqueeze(-1)
    after_BE = STEPS.state(hidden_BTE, before_BE)
    assert after_BE.dtype == torch.float64
    assert after_BE.flatten().tolist() == [(tokens(row) or [-1.0])[-1] for row in range(4)]
