"""h_t = decay_t * h_{t-1} + input_t. B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.linear_recurrence import linear_recurrence


def inputs(time: int, dtype: torch.dtype = torch.float32, batch: int = 2, width: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(time)
    decay_BTD = torch.rand(batch, time, width, generator=g, dtype=torch.float64)
    input_BTD = torch.randn(batch, time, width, generator=g, dtype=torch.float64)
    state_BD = torch.randn(batch, width, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (decay_BTD, input_BTD, state_BD)]


def by_definition(decay_BTD: torch.Tensor, input_BTD: torch.Tensor, state_BD: torch.Tensor) -> torch.Tensor:
    """h_T = prod(a) h_0 + sum_s prod(a after s) b_s, from the closed form and not the recurrence."""
    hidden = []
    for t in range(decay_BTD.shape[1]):
        h_BD = decay_BTD[:, : t + 1].prod(1) * state_BD
        for s in range(t + 1):
            h_BD = h_BD + decay_BTD[:, s + 1 : t + 1].prod(1) * input_BTD[:, s]
        hidden.append(h_BD)
    return torch.stack(hidden, 1)


def test_three_steps_worked_by_hand():
    decay_BTD = torch.tensor([[[0.5], [2.0], [0.0]]])
    input_BTD = torch.tensor([[[1.0], [-1.0], [4.0]]])
    hidden_BTD, last_BD = linear_recurrence(decay_BTD, input_BTD, torch.tensor([[6.0]]))
    assert hidden_BTD.flatten().tolist() == [4.0, 7.0, 4.0]  # 3+1, 8-1, 0+4
    assert last_BD.item() == 4.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("time", [1, 2, 17])
def test_values_and_gradients_are_those_of_the_closed_form_in_float64(time, dtype):
    given = inputs(time, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    hidden_BTD, last_BD = linear_recurrence(*given)
    expected_BTD = by_definition(*exact)
    weight_BTD = torch.randn(expected_BTD.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ((hidden_BTD * weight_BTD).sum() + 3 * last_BD.sum()).backward()
    ((expected_BTD * weight_BTD).sum() + 3 * expected_BTD[:, -1].sum()).backward()
    assert hidden_BTD.dtype == last_BD.dtype == dtype
    assert relative_error(hidden_BTD, expected_BTD) < VALUE[dtype]
    for x, reference in zip(given, exact, strict=True):
        assert relative_error(x.grad, reference.grad) < GRADIENT[dtype]


@pytest.mark.parametrize("time", [1, 6])
def test_the_handwritten_gradient_is_the_numerical_one(time):
    assert torch.autograd.gradcheck(linear_recurrence, inputs(time, torch.float64))


def test_a_gradient_through_the_last_state_alone_arrives():
    decay_BTD, input_BTD, state_BD = inputs(4, torch.float64)
    linear_recurrence(decay_BTD, input_BTD, state_BD)[1].sum().backward()
    torch.testing.assert_close(state_BD.grad, decay_BTD.detach().prod(1))


def test_many_steps_at_once_equal_single_steps_to_the_bit():
    decay_BTD, input_BTD, state_BD = inputs(33)
    hidden_BTD, last_BD = linear_recurrence(decay_BTD, input_BTD, state_BD)
    carried_BD, steps = state_BD, []
    for t in range(33):
        step_B1D, carried_BD = linear_recurrence(decay_BTD[:, t : t + 1], input_BTD[:, t : t + 1], carried_BD)
        steps.append(step_B1D)
    assert torch.equal(torch.cat(steps, 1), hidden_BTD)
    assert torch.equal(carried_BD, last_BD)


def test_bfloat16_inputs_do_not_drift_over_thousands_of_steps():
    time = 4096
    decay_BTD = torch.full((1, time, 1), 0.98, dtype=torch.bfloat16)
    input_BTD = torch.full((1, time, 1), 0.01, dtype=torch.bfloat16)
    state_BD = torch.zeros(1, 1)
    hidden_BTD, last_BD = linear_recurrence(decay_BTD, input_BTD, state_BD)
    exact_BTD, _ = linear_recurrence(decay_BTD.double(), input_BTD.double(), state_BD.double())
    assert hidden_BTD.dtype == torch.bfloat16
    assert last_BD.dtype == torch.float32
    assert relative_error(hidden_BTD, exact_BTD) < VALUE[torch.bfloat16]
    assert relative_error(last_BD, exact_BTD[:, -1]) < VALUE[torch.float32]


def test_shapes_that_do_not_fit_are_named():
    decay_BTD, input_BTD, state_BD = inputs(3)
    with pytest.raises(ValueError, match=r"state \(B, D\), found .* state \(2, 4\)"):
        linear_recurrence(decay_BTD, input_BTD, state_BD[:, :4])
    with pytest.raises(ValueError, match="T >= 1"):
        linear_recurrence(decay_BTD[:, :0], input_BTD[:, :0], state_BD)
