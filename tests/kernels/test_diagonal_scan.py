"""S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t, a decay a state.

B batch, T time, H heads, N states of a channel, P channels of a head
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.diagonal_scan import diagonal_scan, diagonal_scan_reference
from thesean.kernels.linear_attention import linear_attention

BATCH, HEADS, STATES, CHANNELS = 2, 3, 4, 5


def inputs(time: int, dtype: torch.dtype = torch.float32, decay: float = 1.0, channels: int = CHANNELS) -> list[Any]:
    g = torch.Generator().manual_seed(time)
    per_state, per_channel = (BATCH, time, HEADS, STATES), (BATCH, time, HEADS, channels)
    query, key, value = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in (per_state, per_state, per_channel)
    )
    log_decay = -2 * decay * torch.rand(per_state, generator=g, dtype=torch.float64)
    state = torch.randn(BATCH, HEADS, STATES, channels, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (query, key, value, log_decay, state)]


def double(given: list[Any]) -> list[Any]:
    return [x.detach().double().requires_grad_() for x in given]


def test_two_steps_of_two_states_worked_by_hand():
    """One state halves, the other keeps a quarter; both take in v, the second doubled; the query reads both."""
    key = torch.tensor([1.0, 2.0]).expand(1, 2, 1, 2)
    log_decay = torch.tensor([0.5, 0.25]).log().expand(1, 2, 1, 2)
    value = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    state = torch.tensor([8.0, 16.0]).view(1, 1, 2, 1)
    out, last = diagonal_scan(torch.ones(1, 2, 1, 2), key, value, log_decay, state)
    # (8, 16) -> (4 + 3, 4 + 6) -> (3.5 + 5, 2.5 + 10)
    assert last.flatten().tolist() == pytest.approx([8.5, 12.5])
    assert out.flatten().tolist() == pytest.approx([17.0, 21.0])


def test_one_decay_for_all_states_makes_linear_attention_of_it():
    query, key, value, log_decay, state = inputs(20, torch.float64)
    out, _ = diagonal_scan(query, key, value, log_decay[..., :1].expand_as(log_decay), state)
    expected, _ = linear_attention(query, key, value, log_decay[..., 0], state)
    assert relative_error(out, expected) < VALUE[torch.float64]


@pytest.mark.parametrize("decay", [0.0, 0.05, 3.0], ids=["no decay", "slow", "fast"])
@pytest.mark.parametrize(("time", "channels"), [(1, 5), (5, 1), (7, 5), (8, 20), (9, 5), (37, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_chunked_form_equals_the_recurrence_at_every_length(time, channels, decay, dtype):
    given = inputs(time, dtype, decay, channels)
    exact = double(given)
    out, state = diagonal_scan(*given)
    expected_out, expected_state = diagonal_scan_reference(*exact)
    (out.square().sum() + state.sum()).backward()
    (expected_out.square().sum() + expected_state.sum()).backward()
    assert out.dtype == state.dtype == dtype
    assert relative_error(out, expected_out) < VALUE[dtype]
    assert relative_error(state, expected_state) < VALUE[dtype]
    for x, reference in zip(given, exact, strict=True):
        assert relative_error(x.grad, reference.grad) < GRADIENT[dtype]


def test_gradients_are_the_numerical_ones():
    given = inputs(5, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: diagonal_scan(*x, chunk=3), given, fast_mode=True)


def test_pieces_of_any_length_equal_the_whole_sequence():
    given = [x.detach() for x in inputs(41, torch.float64)]
    whole, last = diagonal_scan(*given)
    *sequences, state = given
    outs = []
    for q, k, v, g in zip(*(x.split((1, 1, 17, 3, 19), dim=1) for x in sequences), strict=True):
        out, state = diagonal_scan(q, k, v, g, state)
        outs.append(out)
    assert relative_error(torch.cat(outs, 1), whole) < VALUE[torch.float64]
    assert relative_error(state, last) < VALUE[torch.float64]


@pytest.mark.parametrize("size", [1e3, 1e30, float("inf")], ids=["strong", "overflowing", "reset"])
def test_a_violent_decay_of_one_state_forgets_it_exactly_and_leaves_no_nan(size):
    given = inputs(24)
    with torch.no_grad():
        given[3][:, 10, :, 1] = -size
    exact = double(given)
    out, state = diagonal_scan(*given, chunk=16)
    expected_out, expected_state = diagonal_scan_reference(*exact)
    (out.sum() + state.sum()).backward()
    (expected_out.sum() + expected_state.sum()).backward()
    assert relative_error(out, expected_out) < VALUE[torch.float32]
    for x, reference in zip(given, exact, strict=True):
        assert relative_error(x.grad, reference.grad) < GRADIENT[torch.float32]


def test_half_inputs_and_autocast_keep_a_wide_state():
    given = [x.detach().bfloat16() for x in inputs(70)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = diagonal_scan(*given)
    expected_out, expected_state = diagonal_scan_reference(*(x.double() for x in given))
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(out, expected_out) < VALUE[torch.bfloat16]
    assert relative_error(state, expected_state) < VALUE[torch.float32]


def test_shapes_that_do_not_fit_are_named():
    query, key, value, log_decay, state = inputs(6)
    with pytest.raises(ValueError, match=r"found .* log_decay \(2, 6, 3\)"):
        diagonal_scan(query, key, value, log_decay[..., 0], state)
    with pytest.raises(ValueError, match="chunk 0"):
        diagonal_scan(query, key, value, log_decay, state, chunk=0)
