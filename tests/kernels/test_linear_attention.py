"""S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t. B batch, T time, H heads, F key width, K value width"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.linear_attention import full_linear_attention, linear_attention, linear_attention_reference

BATCH, HEADS, KEY, VALUE_WIDTH = 2, 3, 4, 5


def inputs(time: int, dtype: torch.dtype = torch.float32, decay: float | None = 1.0) -> list[Any]:
    """`decay`: the mean size of the log-decay; None for no decay."""
    g = torch.Generator().manual_seed(time)
    shapes = [(BATCH, time, HEADS, KEY), (BATCH, time, HEADS, KEY), (BATCH, time, HEADS, VALUE_WIDTH)]
    query, key, value = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    log_decay = None if decay is None else -2 * decay * torch.rand(shapes[0][:3], generator=g, dtype=torch.float64)
    state = torch.randn(BATCH, HEADS, KEY, VALUE_WIDTH, generator=g, dtype=torch.float64)
    return [x if x is None else x.to(dtype).requires_grad_() for x in (query, key, value, log_decay, state)]


def double(given: list[Any]) -> list[Any]:
    return [x if x is None else x.detach().double().requires_grad_() for x in given]


def test_two_steps_worked_by_hand():
    one = torch.ones(1, 2, 1, 1)
    value = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    log_decay = torch.full((1, 2, 1), 0.5).log()
    out, state = linear_attention(2 * one, one, value, log_decay, torch.full((1, 1, 1, 1), 8.0))
    assert state.item() == pytest.approx(8.5)  # ((8/2 + 3) / 2) + 5
    assert out.flatten().tolist() == pytest.approx([14.0, 17.0])


@pytest.mark.parametrize("decay", [None, 0.05, 3.0], ids=["no decay", "slow", "fast"])
@pytest.mark.parametrize("time", [1, 7, 8, 9, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_chunked_form_equals_the_recurrence_at_every_length(time, decay, dtype):
    given = inputs(time, dtype, decay)
    exact = double(given)
    out, state = linear_attention(*given, chunk=8)
    expected_out, expected_state = linear_attention_reference(*exact)
    ((out.square()).sum() + state.sum()).backward()
    ((expected_out.square()).sum() + expected_state.sum()).backward()
    assert out.dtype == state.dtype == dtype
    assert relative_error(out, expected_out) < VALUE[dtype]
    assert relative_error(state, expected_state) < VALUE[dtype]
    for x, reference in zip(given, exact, strict=True):
        if x is not None and reference is not None:
            assert relative_error(x.grad, reference.grad) < GRADIENT[dtype]


@pytest.mark.parametrize("decay", [None, 1.0])
def test_gradients_are_the_numerical_ones(decay):
    given = inputs(5, torch.float64, decay)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, chunk=3), given, fast_mode=True)


def test_pieces_of_any_length_equal_the_whole_sequence():
    query, key, value, log_decay, state = (x.detach() for x in inputs(41, torch.float64))
    whole, last = linear_attention(query, key, value, log_decay, state, chunk=16)
    outs, at = [], 0
    for length in (1, 1, 17, 3, 19):
        piece = slice(at, at + length)
        out, state = linear_attention(
            query[:, piece], key[:, piece], value[:, piece], log_decay[:, piece], state, chunk=16
        )
        outs.append(out)
        at += length
    assert at == 41
    assert relative_error(torch.cat(outs, 1), whole) < VALUE[torch.float64]
    assert relative_error(state, last) < VALUE[torch.float64]


@pytest.mark.parametrize("size", [1e3, 1e30, float("inf")], ids=["strong", "overflowing", "reset"])
def test_a_violent_decay_forgets_exactly_and_leaves_no_nan(size):
    given = inputs(24)
    with torch.no_grad():
        given[3][:, 10] = -size
    exact = double(given)
    out, state = linear_attention(*given, chunk=16)
    expected_out, expected_state = linear_attention_reference(*exact)
    (out.sum() + state.sum()).backward()
    (expected_out.sum() + expected_state.sum()).backward()
    assert relative_error(out, expected_out) < VALUE[torch.float32]
    for x, reference in zip(given, exact, strict=True):
        assert torch.isfinite(x.grad).all()
        assert relative_error(x.grad, reference.grad) < GRADIENT[torch.float32]


@pytest.mark.parametrize("decay", [None, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_queries_in_groups_read_the_state_that_repeated_keys_would_make(groups, decay):
    g = torch.Generator().manual_seed(groups)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    query, key, value = normal(2, 21, 4, 3), normal(2, 21, groups, 3), normal(2, 21, groups, 5)
    log_decay = None if decay is None else -normal(2, 21, groups).abs()
    state = normal(2, groups, 3, 5)
    out, last = linear_attention(query, key, value, log_decay, state, chunk=8)
    keys, values = (x.repeat_interleave(4 // groups, 2) for x in (key, value))
    decays = None if log_decay is None else log_decay.repeat_interleave(4 // groups, 2)
    states = state.repeat_interleave(4 // groups, 1)
    expected, expected_last = linear_attention_reference(query, keys, values, decays, states)
    assert relative_error(out, expected) < VALUE[torch.float64]
    assert relative_error(last, expected_last[:, :: 4 // groups]) < VALUE[torch.float64]
    grouped, _ = linear_attention_reference(query, key, value, log_decay, state)
    assert relative_error(grouped, expected) < VALUE[torch.float64]
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: linear_attention(q, k, v, log_decay, s, chunk=8), (query, key, value, state), fast_mode=True
    )
    full = full_linear_attention(query, key, value)
    assert relative_error(full, full_linear_attention(query, keys, values)) < VALUE[torch.float64]


def test_a_column_of_ones_in_the_values_is_the_normaliser():
    query, key, value, _, _ = inputs(20, torch.float64, None)
    query, key = query.abs(), key.abs()
    nothing = torch.zeros(BATCH, HEADS, KEY, VALUE_WIDTH + 1, dtype=torch.float64)
    out, _ = linear_attention(query, key, torch.cat([value, torch.ones_like(value[..., :1])], -1), None, nothing)
    weights_BHTT = torch.einsum("bthf,bshf->bhts", query, key).tril()
    averaged = torch.einsum("bhts,bshk->bthk", weights_BHTT / weights_BHTT.sum(-1, keepdim=True), value)
    assert relative_error(out[..., :-1] / out[..., -1:], averaged) < VALUE[torch.float64]


def test_the_bidirectional_form_reads_every_token_at_every_token():
    query, key, value, _, state = inputs(9, torch.float64, None)
    _, total = linear_attention_reference(query, key, value, None, torch.zeros_like(state))
    expected = torch.einsum("bthf,bhfk->bthk", query, total)
    assert relative_error(full_linear_attention(query, key, value), expected) < VALUE[torch.float64]
    assert torch.autograd.gradcheck(full_linear_attention, (query, key, value), fast_mode=True)


def test_what_the_backward_keeps_grows_linearly_with_time():
    def kept(time: int) -> int:
        seen: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x

        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = linear_attention(*inputs(time), chunk=16)
        assert out.requires_grad
        return sum(seen.values())

    assert kept(512) < 2.2 * kept(256)


def test_autocast_does_not_reach_the_state():
    given = [x.detach() for x in inputs(70)]
    expected_out, expected_state = linear_attention(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = linear_attention(*given)
    assert torch.equal(out, expected_out)
    assert torch.equal(state, expected_state)


def test_half_inputs_keep_a_wide_state():
    given = [x.detach().bfloat16() for x in inputs(70)]
    out, state = linear_attention(*given)
    expected_out, expected_state = linear_attention_reference(*(x.double() for x in given))
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(out, expected_out) < VALUE[torch.bfloat16]
    assert relative_error(state, expected_state) < VALUE[torch.float32]


def test_shapes_that_do_not_fit_are_named():
    query, key, value, log_decay, state = inputs(6)
    with pytest.raises(ValueError, match=r"found .* log_decay \(2, 5, 3\)"):
        linear_attention(query, key, value, log_decay[:, :5], state)
    with pytest.raises(ValueError, match="chunk 0"):
        linear_attention(query, key, value, log_decay, state, chunk=0)
