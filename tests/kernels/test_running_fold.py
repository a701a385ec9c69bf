"""What all steps so far come to. B batch, T time, D width"""

from __future__ import annotations

import math

import pytest
import torch

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.running_fold import JOINED, NOTHING, log_of_sum, running_fold

FOLDS = list(NOTHING)


def numbers(time: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(time)
    return torch.randn(2, time, 3, generator=g, dtype=torch.float64).to(dtype)


def by_steps(x_BTD: torch.Tensor, before_BD: torch.Tensor, fold: str) -> torch.Tensor:
    """Two at a time, in double."""
    of_two = {"product": torch.mul, "logsumexp": torch.logaddexp, "largest": torch.maximum, "least": torch.minimum}
    folds = []
    for x_BD in x_BTD.double().unbind(1):
        before_BD = of_two[fold](before_BD.double(), x_BD)
        folds.append(before_BD)
    return torch.stack(folds, 1)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("time", [1, 2, 17])
def test_values_and_gradients_are_those_of_two_at_a_time(fold, time):
    x, exact = numbers(time).requires_grad_(), numbers(time, torch.float64).requires_grad_()
    before = torch.full((2, 3), 0.5)
    folds, last = running_fold(x, before, fold=fold)
    expected = by_steps(exact, before, fold)
    folds.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(folds, expected) < VALUE[torch.float32]
    assert torch.equal(last, folds[:, -1])
    assert x.grad is not None
    assert exact.grad is not None
    assert relative_error(x.grad, exact.grad) < GRADIENT[torch.float32]


@pytest.mark.parametrize("fold", FOLDS)
def test_chunks_equal_the_whole_from_nothing(fold):
    x = numbers(9)
    nothing = torch.full((2, 3), NOTHING[fold])
    whole, last = running_fold(x, nothing, fold=fold)
    torch.testing.assert_close(whole, by_steps(x, nothing, fold).float())
    parts, at = [], nothing
    for chunk in x.split([4, 1, 4], 1):
        part, at = running_fold(chunk, at, fold=fold)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(at, last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_carried_on_in_float32(dtype):
    x = torch.full((1, 600, 1), 0.999, dtype=dtype)
    folds, last = running_fold(x, torch.ones(1, 1), fold="product")
    assert folds.dtype == dtype
    assert last.dtype == torch.float32
    assert last.item() == pytest.approx(x[0, 0, 0].item() ** 600, rel=1e-4)


def test_a_log_of_a_sum_overflows_nowhere():
    infinite = math.inf
    a = torch.tensor([0.0, 3e4, -3e4, 95.0, -infinite, -infinite, infinite, infinite])
    b = torch.tensor([0.0, -3e4, -3e4, 95.5, -infinite, 2.0, infinite, -infinite])
    assert torch.equal(JOINED["logsumexp"](a, b), log_of_sum(a, b))
    torch.testing.assert_close(log_of_sum(a, b), torch.logaddexp(a, b))


@pytest.mark.parametrize(("x", "before"), [((2, 0, 3), (2, 3)), ((2, 4, 3), (2, 4)), ((2,), ())])
def test_shapes_that_do_not_fit_are_refused(x, before):
    with pytest.raises(ValueError, match=r"running_fold: expected x \(B, T, \.\.\.\) with T >= 1"):
        running_fold(torch.ones(x), torch.ones(before), fold="least")
