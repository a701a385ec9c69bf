"""Batch norms over the rows of all ranks: with one rank they are torch's own.

N rows, C channels
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models import vectors
from thesean.distill.together import _Norms


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_step_is_torchs_own(shape, affine):
    own: nn.Module = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) - 2](3, affine=affine, momentum=0.3)
    for number, affinity in enumerate(own.parameters()):
        nn.init.uniform_(affinity, 0.5 + number, 2.0)
    theirs = copy.deepcopy(own)
    given, also = (vectors(*shape).requires_grad_() for _ in range(2))
    wanted = theirs(also)
    with _Norms():
        found = own(given)
        torch.testing.assert_close(F.relu(found), wanted.relu())  # all else goes on as it did
    torch.testing.assert_close(found, wanted)
    for y in (found, wanted):
        (y * torch.linspace(-1, 2, y.numel()).view(shape)).sum().backward()
    torch.testing.assert_close(given.grad, also.grad, rtol=1e-4, atol=1e-5)
    for mine, other in zip(own.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(own.named_buffers()), dict(theirs.named_buffers()))
    own.eval(), theirs.eval()
    with _Norms():
        torch.testing.assert_close(own(given), theirs(also))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_and_is_summed_in_single(dtype):
    x_NC = (vectors(512, 3) + 100).to(dtype)
    with _Norms():
        y_NC = F.batch_norm(x_NC, None, None, training=True)
    assert y_NC.dtype == dtype
    torch.testing.assert_close(y_NC, F.batch_norm(x_NC.float(), None, None, training=True).to(dtype))


def test_a_row_alone_has_no_variance():
    mean_C, var_C = torch.zeros(2), torch.ones(2)
    with _Norms():
        y_NC = F.batch_norm(torch.tensor([[3.0, 5.0]]), mean_C, var_C, training=True, momentum=0.5)
    assert torch.equal(y_NC, torch.zeros(1, 2))
    assert torch.equal(mean_C, torch.tensor([1.5, 2.5]))
    assert torch.equal(var_C, torch.tensor([0.5, 0.5]))
