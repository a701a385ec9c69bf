"""The Triton recurrence against the float64 reference. B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import KERNEL_GRADIENT, KERNEL_VALUE, relative_error
from thesean.kernels.linear_recurrence import linear_recurrence

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def inputs(time: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(time)
    decay_BTD = torch.rand(2, time, width, generator=g).to(dtype)
    input_BTD = (torch.randn(2, time, width, generator=g) + offset).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return [x.requires_grad_() for x in (decay_BTD, input_BTD, torch.randn(2, width, generator=g).to(wide))]


def with_gradients(given, backend, weight_BTD):
    hidden_BTD, last_BD = linear_recurrence(*given, backend=backend)
    grads = torch.autograd.grad((hidden_BTD * weight_BTD).sum() + 3 * last_BD.sum(), given)
    return [hidden_BTD, last_BD], list(grads)


@pytest.mark.parametrize(
    ("time", "width", "dtype"),
    [(1, 1, torch.float32), (8, 32, torch.float32), (150, 3, torch.float32), *((19, 40, d) for d in DTYPES)],
)
def test_values_and_gradients_are_those_of_the_reference_at_ragged_sizes(time, width, dtype):
    given = inputs(time, width, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    weight_BTD = torch.randn(2, time, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    values, grads = with_gradients(given, "triton", weight_BTD)
    expected, expected_grads = with_gradients(exact, "torch", weight_BTD.double())
    assert values[0].dtype == dtype
    assert values[1].dtype == given[2].dtype
    for value, reference in zip(values, expected, strict=True):
        assert relative_error(value, reference) < KERNEL_VALUE[dtype]
    for x, grad, reference in zip(given, grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype
        assert relative_error(grad, reference) < KERNEL_GRADIENT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_far_from_zero_keep_their_digits(dtype):
    given = inputs(21, 10, dtype, offset=50.0)
    exact = [x.detach().double().requires_grad_() for x in given]
    weight_BTD = torch.ones(2, 21, 10)
    values, grads = with_gradients(given, "triton", weight_BTD.to(dtype))
    expected, expected_grads = with_gradients(exact, "torch", weight_BTD.double())
    assert relative_error(values[0], expected[0]) < KERNEL_VALUE[dtype]
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, reference) < KERNEL_GRADIENT[dtype]


def test_two_runs_agree_to_the_bit():
    given, weight_BTD = inputs(21, 40, torch.float32), torch.ones(2, 21, 40)
    first, second = (with_gradients(given, "triton", weight_BTD) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


def test_many_steps_at_once_equal_single_steps_to_the_bit():
    decay_BTD, input_BTD, state_BD = (x.detach() for x in inputs(19, 9, torch.float32))
    hidden_BTD, last_BD = linear_recurrence(decay_BTD, input_BTD, state_BD, backend="triton")
    for t in range(19):
        step_B1D, state_BD = linear_recurrence(
            decay_BTD[:, t : t + 1], input_BTD[:, t : t + 1], state_BD, backend="triton"
        )
        assert torch.equal(step_B1D[:, 0], hidden_BTD[:, t])
    assert torch.equal(state_BD, last_BD)


def test_inputs_laid_out_otherwise_give_the_same():
    decay_BTD, input_BTD, state_BD = (x.detach() for x in inputs(11, 9, torch.float32))
    turned, also_turned = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (decay_BTD, input_BTD))
    expected_BTD, _ = linear_recurrence(decay_BTD, input_BTD, state_BD, backend="triton")
    assert torch.equal(linear_recurrence(turned, also_turned, state_BD, backend="triton")[0], expected_BTD)
