"""S_t = (I - b_t k_t k_t^T) a_t S_{t-1} + b_t k_t v_t^T, y_t = q_t S_t, with a decay a head or a feature.

B batch, T time, H heads, F key width, K value width
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.delta_rule import delta_rule, delta_rule_reference
from thesean.kernels.linear_attention import linear_attention

BATCH, HEADS, KEY, VALUE_WIDTH = 2, 3, 4, 5


OF_EACH = pytest.mark.parametrize("of", [(), (KEY,)], ids=["a head", "a feature"])


def inputs(time: int, dtype: torch.dtype = torch.float32, decay: float = 1.0, of: tuple[int, ...] = ()) -> list[Any]:
    """query, key of length 1, value, beta in (0, 1), log_decay of mean size `decay`, state."""
    g = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    query = normal(BATCH, time, HEADS, KEY)
    key = F.normalize(normal(BATCH, time, HEADS, KEY), dim=-1)
    value = normal(BATCH, time, HEADS, VALUE_WIDTH)
    beta = torch.rand(BATCH, time, HEADS, generator=g, dtype=torch.float64)
    log_decay = -2 * decay * torch.rand(BATCH, time, HEADS, *of, generator=g, dtype=torch.float64)
    state = normal(BATCH, HEADS, KEY, VALUE_WIDTH)
    return [x.to(dtype).requires_grad_() for x in (query, key, value, beta, log_decay, state)]


def double(given: list[Any]) -> list[Any]:
    return [x.detach().double().requires_grad_() for x in given]


def test_two_steps_worked_by_hand():
    """Keys e1 and (0.6, 0.8), a state of (8, 1), b = 1/2 and a = 1/2; the query reads both rows."""
    key = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).view(1, 2, 1, 2)
    value = torch.tensor([2.0, 10.0]).view(1, 2, 1, 1)
    half = torch.full((1, 2, 1), 0.5)
    state = torch.tensor([8.0, 1.0]).view(1, 1, 2, 1)
    out, last = delta_rule(torch.ones(1, 2, 1, 2), key, value, half, half.log(), state)
    # step 1: (8, 1) decays to (4, 0.5) and holds 4 at e1; half of 2 - 4 is added there: (3, 0.5)
    # step 2: (1.5, 0.25) holds 0.9 + 0.2 = 1.1 at the key; half of 10 - 1.1 is 4.45, times the key: (4.17, 3.81)
    assert last.flatten().tolist() == pytest.approx([4.17, 3.81])
    assert out.flatten().tolist() == pytest.approx([3.5, 7.98])


def test_writing_at_full_rate_replaces_what_a_key_held_and_nothing_else():
    key = torch.eye(2).view(1, 2, 1, 2)[:, [0, 1, 0]]
    value = torch.tensor([3.0, 5.0, 7.0]).view(1, 3, 1, 1)
    _, state = delta_rule(key, key, value, torch.ones(1, 3, 1), torch.zeros(1, 3, 1), torch.zeros(1, 1, 2, 1))
    assert state.flatten().tolist() == pytest.approx([7.0, 5.0])


def test_orthogonal_keys_make_linear_attention_of_it():
    query, _, value, _, log_decay, _ = inputs(4, torch.float64)
    key = torch.eye(4, dtype=torch.float64).expand(BATCH, HEADS, 4, 4).transpose(1, 2)
    zeros = torch.zeros(BATCH, HEADS, KEY, VALUE_WIDTH, dtype=torch.float64)
    out, _ = delta_rule(query, key, value, torch.ones_like(log_decay), log_decay, zeros)
    expected, _ = linear_attention(query, key, value, log_decay, zeros)
    assert relative_error(out, expected) < VALUE[torch.float64]


@OF_EACH
@pytest.mark.parametrize("decay", [0.0, 0.05, 3.0], ids=["no decay", "slow", "fast"])
@pytest.mark.parametrize("time", [1, 7, 8, 9, 37])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_chunked_form_equals_the_recurrence_at_every_length(time, decay, dtype, of):
    given = inputs(time, dtype, decay, of)
    exact = double(given)
    out, state = delta_rule(*given, chunk=8)
    expected_out, expected_state = delta_rule_reference(*exact)
    (out.square().sum() + state.sum()).backward()
    (expected_out.square().sum() + expected_state.sum()).backward()
    assert out.dtype == state.dtype == dtype
    assert relative_error(out, expected_out) < VALUE[dtype]
    assert relative_error(state, expected_state) < VALUE[dtype]
    for x, reference in zip(given, exact, strict=True):
        assert relative_error(x.grad, reference.grad) < GRADIENT[dtype]


def test_a_feature_keeps_what_is_held_at_it_as_long_as_its_own_decay_says():
    """Two features, one that keeps all and one that halves what it holds at each step; nothing is written after."""
    key = torch.eye(2).view(1, 2, 1, 2)
    decay = torch.tensor([1.0, 0.5]).log().expand(1, 5, 1, 2)
    beta = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).view(1, 5, 1)
    key = torch.cat([key, torch.ones(1, 3, 1, 2)], 1)
    value = torch.full((1, 5, 1, 1), 8.0)
    _, state = delta_rule(key, key, value, beta, decay, torch.zeros(1, 1, 2, 1))
    assert state.flatten().tolist() == pytest.approx([8.0, 1.0])


def test_one_decay_for_all_features_is_that_of_the_head():
    query, key, value, beta, log_decay, state = inputs(37, torch.float64)
    of_each = log_decay.unsqueeze(-1).expand(-1, -1, -1, KEY)
    expected = delta_rule(query, key, value, beta, log_decay, state, chunk=8)
    found = delta_rule(query, key, value, beta, of_each, state, chunk=8)
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < VALUE[torch.float64]


def test_keys_that_repeat_cost_no_digits():
    """The worst a chunk's triangular system can be: 64 equal keys, each erased by the next."""
    given = inputs(128, torch.float32, 0.0)
    with torch.no_grad():
        given[1].copy_(given[1][:, :1].expand_as(given[1]))
        given[3].fill_(1.0)
    out, _ = delta_rule(*given)
    expected, _ = delta_rule_reference(*double(given))
    assert relative_error(out, expected) < VALUE[torch.float32]


@OF_EACH
def test_gradients_are_the_numerical_ones(of):
    given = inputs(5, torch.float64, of=of)
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x, chunk=3), given, fast_mode=True)


@OF_EACH
def test_pieces_of_any_length_equal_the_whole_sequence(of):
    given = [x.detach() for x in inputs(41, torch.float64, of=of)]
    whole, last = delta_rule(*given, chunk=16)
    *sequences, state = given
    outs = []
    for q, k, v, b, g in zip(*(x.split((1, 1, 17, 3, 19), dim=1) for x in sequences), strict=True):
        out, state = delta_rule(q, k, v, b, g, state, chunk=16)
        outs.append(out)
    assert relative_error(torch.cat(outs, 1), whole) < VALUE[torch.float64]
    assert relative_error(state, last) < VALUE[torch.float64]


@OF_EACH
def test_a_reset_forgets_exactly_and_leaves_no_nan(of):
    given = inputs(24, of=of)
    with torch.no_grad():
        given[4][:, 10] = -torch.inf
    exact = double(given)
    out, state = delta_rule(*given, chunk=16)
    expected_out, expected_state = delta_rule_reference(*exact)
    (out.sum() + state.sum()).backward()
    (expected_out.sum() + expected_state.sum()).backward()
    assert relative_error(out, expected_out) < VALUE[torch.float32]
    for x, reference in zip(given, exact, strict=True):
        assert relative_error(x.grad, reference.grad) < GRADIENT[torch.float32]


@OF_EACH
def test_half_inputs_and_autocast_keep_a_wide_state(of):
    given = [x.detach().bfloat16() for x in inputs(70, of=of)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = delta_rule(*given)
    expected_out, expected_state = delta_rule_reference(*(x.double() for x in given))
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(out, expected_out) < VALUE[torch.bfloat16]
    assert relative_error(state, expected_state) < VALUE[torch.float32]


def test_shapes_that_do_not_fit_are_named():
    query, key, value, beta, log_decay, state = inputs(6)
    with pytest.raises(ValueError, match=r"found .* beta \(2, 5, 3\)"):
        delta_rule(query, key, value, beta[:, :5], log_decay, state)
    with pytest.raises(ValueError, match=r"found .* log_decay \(2, 6, 3, 3\)"):
        delta_rule(query, key, value, beta, log_decay.unsqueeze(-1).expand(-1, -1, -1, 3), state)
    with pytest.raises(ValueError, match="chunk 0"):
        delta_rule(query, key, value, beta, log_decay, state, chunk=0)
