from __future__ import annotations

import pytest
import torch
from torch import nn

from thesean.targets.shared.norms import BatchNorm, VectorBatchNorm, standardise


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(7, 5), 4 + 3 * torch.randn(200, 7)),
        (nn.Conv2d(7, 5, 3), 4 + 3 * torch.randn(20, 7, 6, 6)),
    ],
)
def test_each_channel_has_mean_zero_and_variance_one_over_all_batches(layer, x):
    standardise(layer, x.split(10))
    y_EN = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y_EN.mean(1), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(y_EN.var(1, correction=0), torch.ones(5), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(2, 3), (4, 2)), (nn.Conv2d(2, 3, 1), (4, 2, 3, 3))])
def test_a_channel_that_never_varies_is_no_division_by_zero(layer, shape):
    nn.init.zeros_(layer.weight)
    standardise(layer, [torch.randn(shape)])
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("norm", "size"), [(BatchNorm(4), (1, 1)), (VectorBatchNorm(4), ())])
def test_batch_norm_reads_its_running_statistics_where_a_batch_is_too_small(norm, size):
    norm.train()
    one = torch.randn(1, 4, *size)  # torch's own raises here
    torch.testing.assert_close(norm(one), one, rtol=1e-4, atol=1e-4)
    many = 3 + torch.randn(64, 4, *size)
    assert norm(many).mean().abs() < 1e-4
    assert norm.running_mean.min() > 0
