from __future__ import annotations

import torch
from torch import nn

from tests.targets.build import build
from tests.targets.spatial_parts import map_part

# of a bottleneck's convolutions, 256 channels outside and 64 inside
WEIGHTS = 256 * 64 + 9 * 64 * 64 + 64 * 256


def weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def test_in_place_of_one_or_three_bottlenecks_it_has_the_weights_of_one():
    for several in (1, 3):
        block = build("bottleneck", map_part((256, 8, 8), params=several * WEIGHTS))
        assert block.width == 64
        assert weights(block) == WEIGHTS


def test_width_is_at_least_eight_where_the_part_has_as_many_channels_and_an_option_overrides_it():
    widths = [build("bottleneck", map_part((channels, 4, 4))).width for channels in (4, 16, 64)]
    assert widths == [4, 8, 16]
    assert build("bottleneck", map_part((64, 4, 4)), width=5).width == 5


def test_it_is_the_papers_block():
    block = build("bottleneck", map_part((16, 8, 8), nonnegative=True), width=4).eval()
    with torch.no_grad():
        for norm in (block.reduced_norm, block.norm):
            norm.weight.uniform_(0.5, 2)
            norm.running_mean.normal_()
    expand = nn.Conv2d(4, 16, 1)
    with torch.no_grad():
        expand.weight.copy_(block.last.weight[:, :, None, None])
        expand.bias.copy_(block.last.bias)
    x = torch.randn(2, 16, 8, 8)
    inner = nn.Sequential(block.reduce, block.reduced_norm, nn.ReLU(), block.spatial, block.norm, nn.ReLU(), expand)
    torch.testing.assert_close(block(x), (inner(x) + x).relu(), rtol=1e-5, atol=1e-5)


def test_the_first_convolution_is_counted_at_the_resolution_that_it_reads():
    part = map_part((8, 8, 8), (16, 4, 4))
    block = build("bottleneck", part)
    behind = block.spatial.weight.numel() + block.last.weight.numel()
    assert block.flops(part, {"batch": 3}) == 2 * 3 * (64 * block.reduce.weight.numel() + 16 * behind)


def test_data_standardise_both_hidden_maps():
    part = map_part((6, 8, 8), (12, 4, 4))
    block = build("bottleneck", part)
    x = 3 + 2 * torch.randn(8, 6, 8, 8)
    block.prepare(part, [(x, torch.zeros(8, 12, 4, 4))])
    reduced = block.reduce(x)
    for hidden in (reduced, block.spatial(block.places.place(reduced.relu()))):
        torch.testing.assert_close(hidden.mean((0, 2, 3)), torch.zeros(block.width), rtol=0, atol=1e-4)
        torch.testing.assert_close(hidden.var((0, 2, 3)), torch.ones(block.width), rtol=0, atol=1e-2)
