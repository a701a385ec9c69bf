from __future__ import annotations

import torch
from torch import nn

from tests.targets.build import build
from tests.targets.spatial_parts import map_part


def weights(channels_in: int, channels: int) -> int:
    """Of a basic block's two convolutions."""
    return 9 * channels_in * channels + 9 * channels * channels


def test_a_basic_block_gets_the_guides_width():
    for channels in (16, 64, 512):
        assert build("resnet-block", map_part((channels, 4, 4), params=weights(channels, channels))).width == channels


def test_in_place_of_a_bottleneck_it_has_no_more_weights_than_the_bottleneck():
    bottleneck = 256 * 64 + 9 * 64 * 64 + 64 * 256
    block = build("resnet-block", map_part((256, 8, 8), params=bottleneck))
    assert block.width == 8
    assert sum(p.numel() for p in block.parameters() if p.ndim > 1) <= bottleneck
    three = build("resnet-block", map_part((256, 8, 8), params=3 * bottleneck))
    assert three.width == 40


def test_width_is_at_least_eight_where_the_part_has_as_many_channels_and_an_option_overrides_it():
    assert build("resnet-block", map_part((16, 4, 4), params=1)).width == 8
    assert build("resnet-block", map_part((4, 4, 4), params=1)).width == 4
    assert build("resnet-block", map_part((16, 4, 4)), width=5).width == 5


def test_it_is_the_papers_block_when_it_has_that_blocks_weights():
    part = map_part((4, 8, 8), params=weights(4, 4), nonnegative=True)
    block = build("resnet-block", part).eval()
    conv1, conv2, norm = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.running_mean.normal_()
        block.first.load_state_dict(conv1.state_dict())
        block.norm.load_state_dict(norm.state_dict())
        block.last.weight.copy_(conv2.weight.flatten(1))
        block.last.bias.copy_(conv2.bias)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), (conv2(norm(conv1(x)).relu()) + x).relu(), rtol=1e-5, atol=1e-5)


def test_a_shape_that_changes_has_its_projection_among_the_columns_of_last():
    block = build("resnet-block", map_part((6, 8, 8), (12, 4, 4)))
    assert block.last.in_features == 9 * block.width + 6
    assert build("resnet-block", map_part((6, 8, 8), (12, 4, 4), is_branch=True)).last.in_features == 9 * block.width
