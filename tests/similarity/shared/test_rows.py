"""Masks: padding takes no part."""

from __future__ import annotations

import pytest
import torch

from thesean.errors import DataError
from thesean.similarity import measures, similarity


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", measures())
def test_masked_rows_are_as_if_they_were_not_there_even_when_nan(name):
    x_NP, y_NP = features(24, 5), features(24, 5, seed=1)
    keep_N = torch.arange(24) % 4 != 0
    expected = similarity(x_NP[keep_N], y_NP[keep_N], name)
    x_NP[~keep_N] = torch.nan
    x_NP.requires_grad_()
    value = similarity(x_NP, y_NP, name, mask=keep_N)
    assert torch.equal(value.detach(), expected)
    if value.requires_grad:
        value.backward()
        assert x_NP.grad is not None
        assert x_NP.grad.isfinite().all()
        assert (x_NP.grad[~keep_N] == 0).all()
        assert (x_NP.grad[keep_N] != 0).any()


def test_an_attention_mask_of_ones_and_zeros_masks_tokens():
    x_BTD, y_BTE = features(4, 6, 5), features(4, 6, 7, seed=1)
    mask_BT = (torch.arange(6) < torch.tensor([6, 3, 4, 1]).unsqueeze(1)).long()
    expected = similarity(x_BTD[mask_BT.bool()], y_BTE[mask_BT.bool()])
    assert torch.equal(similarity(x_BTD, y_BTE, flatten="token", mask=mask_BT), expected)
    assert torch.equal(similarity(x_BTD, y_BTE, flatten="token", mask=mask_BT.flatten()), expected)


def test_a_mask_that_does_not_fit_is_refused_with_a_way_out():
    x_BTD, y_BTE = features(4, 6, 5), features(4, 6, 7, seed=1)
    with pytest.raises(DataError, match=r"expected shape \(4,\) for x, found \(4, 6\). Use flatten='token'"):
        similarity(x_BTD, y_BTE, mask=torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(DataError, match=r"expected shape \(4, 6\) for x, found \(4, 5\)"):
        similarity(x_BTD, y_BTE, flatten="token", mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(DataError, match=r"found torch.float32. Make it so: mask\.bool"):
        similarity(x_BTD, y_BTE, flatten="token", mask=torch.ones(4, 6))
    with pytest.raises(DataError, match="cka: expected at least 4 examples, found 0"):
        similarity(x_BTD, y_BTE, mask=torch.zeros(4, dtype=torch.bool))
