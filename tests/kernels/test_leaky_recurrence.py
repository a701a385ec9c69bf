"""h_t = (1 - a) h_{t-1} + a tanh(R h_{t-1} + drive_t). B batch, T time, E units, G blocks, P units of a block"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.leaky_recurrence import leaky_recurrence

BATCH, BLOCKS, SIZE = 2, 3, 2
UNITS = BLOCKS * SIZE


def inputs(time: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(time)
    drive_BTE = torch.randn(BATCH, time, UNITS, generator=g, dtype=torch.float64)
    recurrent_GPP = torch.randn(BLOCKS, SIZE, SIZE, generator=g, dtype=torch.float64) * 0.5
    leak_E = torch.rand(UNITS, generator=g, dtype=torch.float64)
    state_BE = torch.rand(BATCH, UNITS, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (drive_BTE, recurrent_GPP, leak_E, state_BE)]


def by_definition(
    drive_BTE: torch.Tensor, recurrent_GPP: torch.Tensor, leak_E: torch.Tensor, state_BE: torch.Tensor
) -> torch.Tensor:
    """With R as one matrix, and the sum as it is written."""
    recurrent_EE = torch.block_diag(*recurrent_GPP)
    hidden = []
    for drive_BE in drive_BTE.unbind(1):
        state_BE = (1 - leak_E) * state_BE + leak_E * torch.tanh(state_BE @ recurrent_EE.T + drive_BE)
        hidden.append(state_BE)
    return torch.stack(hidden, 1)


def test_one_step_of_two_units_worked_by_hand():
    recurrent_GPP = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])  # the first reads twice the second
    leak_E, state_BE = torch.tensor([0.5, 1.0]), torch.tensor([[0.4, 0.1]])
    hidden_BTE, last_BE = leaky_recurrence(torch.tensor([[[0.3, -0.4]]]), recurrent_GPP, leak_E, state_BE)
    expected = [0.5 * 0.4 + 0.5 * math.tanh(0.5), 0.0]
    assert last_BE.flatten().tolist() == pytest.approx(expected)
    assert hidden_BTE.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("time", [1, 2, 17])
def test_values_and_gradients_are_those_of_one_matrix_in_float64(time, dtype):
    given = inputs(time, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    hidden_BTE, last_BE = leaky_recurrence(*given)
    expected_BTE = by_definition(*exact)
    (hidden_BTE.square().sum() + last_BE.sum()).backward()
    (expected_BTE.square().sum() + expected_BTE[:, -1].sum()).backward()
    assert hidden_BTE.dtype == last_BE.dtype == dtype
    assert relative_error(hidden_BTE, expected_BTE) < VALUE[dtype]
    assert torch.equal(last_BE, hidden_BTE[:, -1])
    for x, reference in zip(given, exact, strict=True):
        assert relative_error(x.grad, reference.grad) < GRADIENT[dtype]


def test_gradients_are_the_numerical_ones():
    assert torch.autograd.gradcheck(leaky_recurrence, inputs(4, torch.float64), fast_mode=True)


def test_without_a_leak_it_is_torchs_own_cell():
    drive_BTE, recurrent_GPP, leak_E, state_BE = (x.detach() for x in inputs(9))
    cell = nn.RNN(UNITS, UNITS, batch_first=True, bias=False)
    with torch.no_grad():
        cell.weight_ih_l0.copy_(torch.eye(UNITS))
        cell.weight_hh_l0.copy_(torch.block_diag(*recurrent_GPP))
        expected_BTE, _ = cell(drive_BTE, state_BE.unsqueeze(0))
    hidden_BTE, _ = leaky_recurrence(drive_BTE, recurrent_GPP, torch.ones_like(leak_E), state_BE)
    torch.testing.assert_close(hidden_BTE, expected_BTE)


def test_single_steps_equal_all_steps_at_once():
    drive_BTE, recurrent_GPP, leak_E, state_BE = (x.detach() for x in inputs(11))
    whole_BTE, last_BE = leaky_recurrence(drive_BTE, recurrent_GPP, leak_E, state_BE)
    steps = []
    for drive_B1E in drive_BTE.split(1, dim=1):
        step_B1E, state_BE = leaky_recurrence(drive_B1E, recurrent_GPP, leak_E, state_BE)
        steps.append(step_B1E)
    torch.testing.assert_close(torch.cat(steps, 1), whole_BTE)
    torch.testing.assert_close(state_BE, last_BE)


def test_half_inputs_keep_a_wide_state():
    given = [x.detach().bfloat16() for x in inputs(70)]
    hidden_BTE, last_BE = leaky_recurrence(*given)
    expected_BTE = by_definition(*(x.double() for x in given))
    assert hidden_BTE.dtype == torch.bfloat16
    assert last_BE.dtype == torch.float32
    assert relative_error(hidden_BTE, expected_BTE) < VALUE[torch.bfloat16]
    assert relative_error(last_BE, expected_BTE[:, -1]) < VALUE[torch.float32]


def test_shapes_that_do_not_fit_are_named():
    drive_BTE, recurrent_GPP, leak_E, state_BE = inputs(3)
    with pytest.raises(ValueError, match=r"found .* leak \(5,\)"):
        leaky_recurrence(drive_BTE, recurrent_GPP, leak_E[:5], state_BE)
    with pytest.raises(ValueError, match="T >= 1"):
        leaky_recurrence(drive_BTE[:, :0], recurrent_GPP, leak_E, state_BE)
