"""The Gram of centred features against its definition in float64. N examples, P width"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import VALUE, relative_error
from thesean.kernels.centred_gram import centred_gram


def features(n: int, p: int, offset: float, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(n, p, generator=torch.Generator().manual_seed(n)) + offset).to(dtype)


def by_definition(x_NP: torch.Tensor) -> torch.Tensor:
    wide_NP = x_NP.double() - x_NP.double().mean(0)
    return wide_NP @ wide_NP.mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
@pytest.mark.parametrize(("n", "p"), [(5, 3), (70, 40), (300, 1100)], ids=["one panel", "two", "panels and columns"])
def test_it_is_the_product_of_the_centred_features_at_any_offset(n, p, offset, dtype):
    x_NP = features(n, p, offset, dtype)
    gram_NN = centred_gram(x_NP)
    wide = torch.promote_types(dtype, torch.float32)
    assert gram_NN.dtype == wide
    assert torch.equal(gram_NN, gram_NN.mT)
    # what float32 rounded off the mean is of each row and column one number, which every reader takes away
    wide_NN = gram_NN.double()
    wide_NN = wide_NN - wide_NN.mean(0)
    assert relative_error(wide_NN - wide_NN.mean(1, keepdim=True), by_definition(x_NP)) < VALUE[wide]


def test_it_goes_where_it_is_told_in_that_dtype():
    x_NP, out_NN = features(20, 6, 30.0, torch.float32), torch.empty(20, 20, dtype=torch.float64)
    assert centred_gram(x_NP, out_NN) is out_NN
    assert relative_error(out_NN, by_definition(x_NP)) < VALUE[torch.float64]


def test_autocast_does_not_lower_the_precision_and_nothing_carries_a_gradient():
    x_NP = features(20, 6, 0.0, torch.float32).requires_grad_()
    expected_NN = centred_gram(x_NP)
    assert not expected_NN.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(centred_gram(x_NP), expected_NN)
