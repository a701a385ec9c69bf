"""Masks: padding takes no part."""

from __future__ import annotations

import pytest
import torch

from thesean.errors import DataError
from thesean.similarity import similarity


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
