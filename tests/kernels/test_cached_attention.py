"""Attention over remembered steps and new ones against the formula.

B batch, T new steps, P remembered steps, H heads, G heads of keys and values, K head width
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import VALUE, relative_error
from thesean.kernels.cached_attention import cached_attention, latest

HEADS, WIDTH = 4, 3


def inputs(time: int, past: int, groups: int = HEADS, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """query, key, value, the bias of a causal mask, past keys and values."""
    g = torch.Generator().manual_seed(10 * time + past)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden_TS = torch.ones(time, past + time, dtype=torch.bool).triu(past + 1)
    bias = torch.zeros(2, 1, time, past + time, dtype=torch.float64).masked_fill(hidden_TS, -1e4)
    given = [normal(2, HEADS, time, WIDTH), normal(2, groups, time, WIDTH), normal(2, groups, time, 5), bias]
    return [x.to(dtype) for x in (*given, normal(2, groups, past, WIDTH), normal(2, groups, past, 5))]


def test_one_remembered_step_and_a_new_one_worked_by_hand():
    one = torch.ones(1, 1, 1, 1)
    mixed, keys, values = cached_attention(
        one, torch.tensor(2.0).log() * one, 10 * one, torch.zeros(1, 1, 1, 2), torch.tensor(3.0).log() * one, 20 * one
    )
    assert mixed.item() == pytest.approx((2 * 10 + 3 * 20) / 5)  # exp(q k) is 2 and 3
    assert keys.flatten().exp().tolist() == pytest.approx([3.0, 2.0])
    assert values.flatten().tolist() == [20.0, 10.0]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("time", "past"), [(1, 0), (1, 6), (5, 0), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_equals_torchs_own_attention_over_all_steps(time, past, groups, dtype):
    query, key, value, bias, *before = inputs(time, past, groups, dtype)
    mixed, keys, values = cached_attention(query, key, value, bias, *before)
    assert mixed.dtype == keys.dtype == values.dtype == dtype
    every_key, every_value = (torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True))
    assert torch.equal(keys, every_key)
    assert torch.equal(values, every_value)
    all_key, all_value = (x.double().repeat_interleave(HEADS // groups, 1) for x in (every_key, every_value))
    want = F.scaled_dot_product_attention(query.double(), all_key, all_value, attn_mask=bias.double(), scale=1.0)
    assert relative_error(mixed, want) < VALUE[dtype]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
def test_steps_at_once_equal_single_steps(cap, window):
    query, key, value, bias, *_ = inputs(7, 0)
    if window is not None:
        bias = bias.masked_fill(torch.ones(7, 7, dtype=torch.bool).tril(-window), -1e4)
    whole, *kept = cached_attention(query, key, value, bias, key[:, :, :0], value[:, :, :0], cap=cap, window=window)
    state, parts = (key[:, :, :0], value[:, :, :0]), []
    for t in range(7):
        step = slice(t, t + 1)
        first = t - state[0].shape[2]
        mixed, *after = cached_attention(
            query[:, :, step], key[:, :, step], value[:, :, step], bias[:, :, step, first : t + 1], *state,
            cap=cap, window=window,
        )  # fmt: skip
        state = (after[0], after[1])
        parts.append(mixed)
    assert relative_error(torch.cat(parts, 2), whole) < VALUE[torch.float64]
    assert [s.shape[2] for s in state] == [7 if window is None else 3] * 2
    assert all(torch.equal(one, other) for one, other in zip(state, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sink_is_one_more_key_of_its_score_without_a_value(dtype):
    query, key, value, bias, *before = inputs(5, 3, 2, dtype)
    sink_H = torch.tensor([-1.0, 0.0, 1.0, 30.0]).to(dtype)
    mixed, *kept = cached_attention(query, key, value, bias, *before, sink_H)
    scores_BHTS = query.double() @ torch.cat([before[0], key], 2).double().repeat_interleave(2, 1).mT + bias.double()
    weights = scores_BHTS.exp() / (scores_BHTS.exp().sum(-1, keepdim=True) + sink_H.double().exp().view(-1, 1, 1))
    want = weights @ torch.cat([before[1], value], 2).double().repeat_interleave(2, 1)
    assert relative_error(mixed, want) < VALUE[dtype]
    without = cached_attention(query, key, value, bias, *before)[1:]
    assert all(torch.equal(one, other) for one, other in zip(kept, without, strict=True))


def test_a_cap_bends_large_scores():
    query, key, value, bias, *before = inputs(5, 3)
    sharp = cached_attention(100 * query, key, value, bias, *before)[0]
    bent = cached_attention(100 * query, key, value, bias, *before, cap=1.0)[0]
    every_key, every_value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
    want = (torch.tanh(100 * query @ every_key.mT) + bias).softmax(-1) @ every_value
    assert relative_error(bent, want) < VALUE[torch.float64]
    assert relative_error(sharp, want) > 0.1


@pytest.mark.parametrize(("window", "kept"), [(None, 5), (1, 0), (3, 2), (6, 5), (9, 5)])
def test_what_is_kept_is_what_later_queries_see(window, kept):
    x = torch.arange(5)
    assert torch.equal(latest(x, 0, window), x[5 - kept :])
