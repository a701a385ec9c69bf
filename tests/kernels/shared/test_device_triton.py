"""Asking for Triton where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from thesean.kernels.cka import cka
from thesean.kernels.dmnn import dmnn
from thesean.kernels.linear_recurrence import linear_recurrence

pytest.importorskip("triton")

X_NP = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
X_BTD = X_NP[None]


@pytest.mark.parametrize(
    "run",
    [
        lambda: cka(X_NP, X_NP, backend="triton"),
        lambda: dmnn(X_NP, X_NP, backend="triton"),
        lambda: linear_recurrence(X_BTD, X_BTD, torch.zeros(1, 4), backend="triton"),
    ],
    ids=["cka", "dmnn", "linear_recurrence"],
)
def test_triton_on_a_cpu_says_what_to_do_instead(run):
    with pytest.raises(ValueError, match=r"expected CUDA tensors for Triton, found cpu. Use backend='torch'"):
        run()


def test_auto_on_a_cpu_is_the_reference():
    assert torch.equal(cka(X_NP, X_NP), cka(X_NP, X_NP, backend="torch"))
