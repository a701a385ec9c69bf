"""y_t = b + sum_j w_j x_{t-W+1+j}. B batch, T time, E channels, W taps, R = W - 1"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import VALUE, relative_error
from thesean.kernels.causal_convolution import causal_convolution


def inputs(time: int, dtype: torch.dtype = torch.float64, taps: int = 4) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(time)
    shapes = [(2, time, 3), (3, taps), (3,), (2, taps - 1, 3)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_three_steps_worked_by_hand():
    """Two taps: ten times the last input and this one, plus a half."""
    x_BTE = torch.tensor([[[1.0], [2.0], [3.0]]])
    window_BRE = torch.tensor([[[7.0]]])
    y_BTE, after_BRE = causal_convolution(x_BTE, torch.tensor([[10.0, 1.0]]), torch.tensor([0.5]), window_BRE)
    assert y_BTE.flatten().tolist() == [71.5, 12.5, 23.5]
    assert after_BRE.flatten().tolist() == [3.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 20])
def test_it_is_a_grouped_convolution_of_the_window_and_the_inputs(time, dtype):
    x_BTE, weight_EW, bias_E, window_BRE = inputs(time, dtype)
    y_BTE, after_BRE = causal_convolution(x_BTE, weight_EW, bias_E, window_BRE)
    seen_BTE = torch.cat([window_BRE, x_BTE], 1)
    expected = F.conv1d(
        seen_BTE.transpose(1, 2).double(), weight_EW.unsqueeze(1).double(), bias_E.double(), groups=3
    ).transpose(1, 2)
    assert relative_error(y_BTE, expected) < VALUE[dtype]
    assert torch.equal(after_BRE, seen_BTE[:, -3:])


def test_the_activation_is_of_the_output_alone():
    plain_BTE, plain_BRE = causal_convolution(*inputs(4))
    y_BTE, after_BRE = causal_convolution(*inputs(4), activation="silu")
    torch.testing.assert_close(y_BTE, plain_BTE * torch.sigmoid(plain_BTE))
    assert torch.equal(after_BRE, plain_BRE)


def test_gradients_are_the_numerical_ones():
    assert torch.autograd.gradcheck(causal_convolution, inputs(5))


def test_steps_shorter_than_the_window_equal_all_steps_at_once():
    x_BTE, weight_EW, bias_E, window_BRE = inputs(9)
    whole_BTE, last_BRE = causal_convolution(x_BTE, weight_EW, bias_E, window_BRE)
    pieces = []
    for piece_BTE in x_BTE.split((1, 2, 1, 5), dim=1):
        y_BTE, window_BRE = causal_convolution(piece_BTE, weight_EW, bias_E, window_BRE)
        pieces.append(y_BTE)
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BTE)
    assert torch.equal(window_BRE, last_BRE)


def test_shapes_that_do_not_fit_are_named():
    x_BTE, weight_EW, bias_E, window_BRE = inputs(4)
    with pytest.raises(ValueError, match=r"window \(B, W - 1, E\), found .* window \(2, 2, 3\)"):
        causal_convolution(x_BTE, weight_EW, bias_E, window_BRE[:, 1:])
