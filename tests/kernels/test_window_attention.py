"""Softmax over the last W tokens and what older ones sum to, as one mean.

B batch, T time, W window, H heads, G heads of keys and values, C width of queries and keys, k columns of the values
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.window_attention import window_attention, window_attention_reference

BATCH, HEADS, WIDTH, COLUMNS = 2, 4, 3, 5


def inputs(
    time: int, window: int, groups: int = HEADS, dtype: torch.dtype = torch.float64, empty: int = 0
) -> list[torch.Tensor]:
    """query, key, value, older and gate; the first `empty` rows of the window hold no token."""
    g = torch.Generator().manual_seed(100 * time + window)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    value = normal(BATCH, window + time, groups, COLUMNS)
    value[..., -1] = 1
    value[:, :empty] = 0
    older = torch.cat([normal(BATCH, time, HEADS, COLUMNS - 1), normal(BATCH, time, HEADS, 1).exp()], -1)
    given = [
        normal(BATCH, time, HEADS, WIDTH), normal(BATCH, window + time, groups, WIDTH), value, older, normal(HEADS),
    ]  # fmt: skip
    return [x.to(dtype) for x in given]


def test_two_tokens_and_an_older_one_worked_by_hand():
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([7.0, 2.0, 3.0]).log().view(1, 3, 1, 1)  # exp(q.k) is 2 and 3; the first row left the window
    value = torch.tensor([[50.0, 1.0], [10.0, 1.0], [20.0, 1.0]]).view(1, 3, 1, 2)
    older = torch.tensor([30.0, 0.5]).view(1, 1, 1, 2)  # values that sum to 30, weights that sum to 0.5
    mean = window_attention(query, key, value, older, torch.tensor([math.log(4.0)]))
    assert mean.item() == pytest.approx((2 * 10 + 3 * 20 + 4 * 30) / (2 + 3 + 4 * 0.5))


@pytest.mark.thorough
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("time", "window"), [(1, 1), (1, 40), (7, 3), (33, 1), (32, 32), (70, 33), (100, 5), (5, 70)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_equal_the_formula_at_every_length_and_window(time, window, groups, dtype):
    given = [x.requires_grad_() for x in inputs(time, window, groups, dtype, empty=window // 2)]
    exact = [x.detach().double().requires_grad_() for x in given]
    mean, expected = window_attention(*given), window_attention_reference(*exact)
    mean.square().sum().backward()
    expected.square().sum().backward()
    assert mean.dtype == dtype
    assert relative_error(mean, expected) < VALUE[dtype]
    for x, reference in zip(given, exact, strict=True):
        assert relative_error(x.grad, reference.grad) < GRADIENT[dtype]


def test_a_window_over_everything_is_softmax_attention():
    query, key, value, older, gate = inputs(20, 20, empty=20)
    mean = window_attention(query, key, value, torch.zeros_like(older), gate)
    q, k, v = (x.transpose(1, 2) for x in (query, key[:, 20:], value[:, 20:, :, :-1]))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize(("time", "window"), [(1, 1), (7, 3), (70, 33), (5, 70)])
def test_a_bias_of_distance_is_added_as_the_formula_says(time, window, groups):
    given = inputs(time, window, groups, empty=window // 2)
    bias_HW = torch.randn(HEADS, window, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = window_attention(*[*given, bias_HW])
    assert relative_error(mean, window_attention_reference(*[*given, bias_HW])) < VALUE[torch.float64]
    assert relative_error(mean, window_attention(*given)) > 1e-3 or window == 1
    narrow = [x.float() for x in given]
    assert relative_error(window_attention(*[*narrow, bias_HW.float()]), mean) < VALUE[torch.float32]


def test_a_bias_over_everything_is_softmax_attention_with_that_bias():
    query, key, value, older, gate = inputs(20, 20, empty=20)
    bias_HW = torch.randn(HEADS, 20, dtype=torch.float64)
    mean = window_attention(query, key, value, torch.zeros_like(older), gate, bias_HW)
    step_T = torch.arange(20)
    distance_TT = step_T.unsqueeze(1) - step_T
    added_HTT = bias_HW[:, distance_TT.clamp_min(0)].masked_fill(distance_TT < 0, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (query, key[:, 20:], value[:, 20:, :, :-1]))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added_HTT, scale=1.0).transpose(1, 2)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_bias():
    given = [x.requires_grad_() for x in (*inputs(5, 3), torch.randn(HEADS, 3, dtype=torch.float64))]
    assert torch.autograd.gradcheck(window_attention, given, fast_mode=True)


def test_a_bias_of_another_window_is_refused():
    with pytest.raises(ValueError, match=r"bias \(4, 5\) for \(H, W\)"):
        window_attention(*[*inputs(7, 3), torch.zeros(HEADS, 5, dtype=torch.float64)])


@pytest.mark.parametrize("groups", [4, 2])
def test_gradients_are_the_numerical_ones(groups):
    given = [x.requires_grad_() for x in inputs(5, 3, groups)]
    assert torch.autograd.gradcheck(window_attention, given, fast_mode=True)


def test_gradients_are_the_numerical_ones_where_nothing_is_older():
    query, key, value, older, gate = inputs(5, 3, empty=3)
    older = torch.zeros_like(older)
    given = [x.requires_grad_() for x in (query, key, gate)]
    assert torch.autograd.gradcheck(lambda q, k, g: window_attention(q, k, value, older, g), given, fast_mode=True)


def test_a_row_without_a_token_counts_for_nothing_whatever_its_key():
    query, key, value, older, gate = inputs(6, 4, empty=3)
    other = key.clone()
    other[:, :3] = 50.0
    assert torch.equal(
        window_attention(query, other, value, older, gate), window_attention(query, key, value, older, gate)
    )


@pytest.mark.parametrize("size", [200.0, 5e4], ids=["past exp in float32", "far past it"])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_past_the_range_of_exp_leave_a_mean_and_its_gradient_finite(size, sign):
    query, key, value, older, gate = (x.requires_grad_() for x in inputs(40, 4, dtype=torch.float32))
    mean = window_attention(query.abs(), sign * size * key.abs(), value, older, gate)
    mean.sum().backward()
    assert torch.isfinite(mean).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (query, key, value, older, gate))
    seen = torch.cat([value[..., :-1].flatten(), (older[..., :-1] / older[..., -1:]).flatten()])
    assert mean.min() >= seen.min()
    assert mean.max() <= seen.max()


def test_an_infinitesimal_older_weight_beside_vanishing_scores_decides_the_mean():
    query, key, value, older, gate = inputs(3, 2, dtype=torch.float32)
    older = torch.cat([older[..., :-1] * 1e-30, torch.full_like(older[..., -1:], 1e-30)], -1)
    mean = window_attention(query.abs(), -1e4 * key.abs(), value, older, gate)
    torch.testing.assert_close(mean, older[..., :-1] / older[..., -1:])


def test_what_the_backward_keeps_grows_linearly_with_time():
    def kept(time: int) -> int:
        seen: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def pack(x: torch.Tensor) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            window_attention(*(x.requires_grad_() for x in inputs(time, 32)))
        return sum(seen.values())

    assert kept(1024) < 2.1 * kept(512)


def test_half_inputs_are_computed_in_float32():
    given = [x.bfloat16() for x in inputs(40, 8)]
    mean = window_attention(*given)
    assert mean.dtype == torch.bfloat16
    assert relative_error(mean, window_attention_reference(*(x.double() for x in given))) < VALUE[torch.bfloat16]
    plain = [x.float() for x in given]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = window_attention(*plain)
    assert torch.equal(under, window_attention(*plain))


def test_shapes_that_do_not_fit_are_named():
    query, key, value, older, gate = inputs(6, 4)
    with pytest.raises(ValueError, match=r"W >= 1, .* key \(2, 6, 4, 3\)"):
        window_attention(query, key[:, :6], value[:, :6], older, gate)
    with pytest.raises(ValueError, match=r"gate \(3,\)"):
        window_attention(query, key, value, older, gate[:3])
