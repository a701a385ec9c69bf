"""What every family for feature maps promises, and the windows beneath.

B batch, C channels, H height, W width
"""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from tests.targets.build import build
from tests.targets.spatial_parts import map_part
from thesean.errors import TargetMismatchError
from thesean.targets import rebuild
from thesean.targets.shared.feature_map import Windows, make_norm

FAMILIES = ["conv", "conv-2d", "resnet-block", "linear"]
EVERY = pytest.mark.parametrize("name", FAMILIES)
# same, halved, wider and halved, odd sizes, unpadded convolutions, a global pool, another stride a side
SHAPES = [
    ((6, 8, 8), (6, 8, 8)),
    ((6, 8, 8), (6, 4, 4)),
    ((6, 8, 8), (12, 4, 4)),
    ((6, 7, 9), (4, 4, 5)),
    ((6, 8, 8), (6, 6, 6)),
    ((6, 5, 5), (8, 1, 1)),
    ((6, 8, 12), (6, 8, 4)),
]


@EVERY
@pytest.mark.parametrize(("shape_in", "shape_out"), SHAPES)
def test_any_smaller_map_comes_out_and_the_config_round_trips(name, shape_in, shape_out):
    module = build(name, map_part(shape_in, shape_out)).eval()
    x = torch.randn(3, *shape_in)
    y = module(x)
    assert y.shape == (3, *shape_out)
    assert not module.stateful
    again = rebuild(module.family, json.loads(json.dumps(module.config()))).eval()
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(x), y, rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize(("shape_in", "shape_out"), SHAPES[:4])
def test_forward_is_last_of_features_plus_skip_rectified_where_the_guide_is(
    name, shape_in, shape_out, branch, nonnegative
):
    module = build(name, map_part(shape_in, shape_out, is_branch=branch, nonnegative=nonnegative)).eval()
    x = torch.randn(3, *shape_in)
    features, _ = module.features(x)
    assert features.shape == (3, *shape_out[1:], module.last.in_features)
    expected = module.shape(module.last(features))
    skip = module.skip(x)
    assert (skip is None) == (branch or shape_in != shape_out)
    expected = expected if skip is None else expected + skip
    if nonnegative and name != "linear":
        expected = expected.relu()
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_unshape_undoes_shape(name):
    module = build(name, map_part((6, 8, 8), (5, 4, 4)))
    y_BHWC = torch.randn(3, 4, 4, 5)
    torch.testing.assert_close(module.unshape(module.shape(y_BHWC)), y_BHWC, rtol=0, atol=0)


@EVERY
def test_loss_falls_on_a_toy_part(name):
    part = map_part((6, 8, 8), (6, 4, 4))
    x = torch.randn(32, 6, 8, 8)
    wanted = F.avg_pool2d(F.conv2d(x, torch.randn(6, 6, 1, 1)), 2).tanh()
    module = build(name, part)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (module(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", ["conv-2d", "resnet-block", "linear"])
@pytest.mark.parametrize(
    ("shape_in", "shape_out", "message"),
    [
        ((6, "height", 8), (6, 8, 8), "expected static channels, height and width"),
        ((6, 8, 8), (6, 16, 16), r"no larger .*found \(batch, 6, 8, 8\) -> \(batch, 6, 16, 16\)\. Choose target 'mlp'"),
    ],
)
def test_a_map_of_dynamic_size_or_one_that_grows_is_refused(name, shape_in, shape_out, message):
    with pytest.raises(TargetMismatchError, match=rf"^layer3\.1: target '{name}' .*{message}"):
        build(name, map_part(shape_in, shape_out))


@pytest.mark.parametrize("name", ["conv-2d", "resnet-block"])
def test_a_part_that_is_no_feature_map_is_refused(name, sequence_part):
    with pytest.raises(TargetMismatchError, match=rf"^layers\.0: target '{name}' expected a feature map"):
        build(name, sequence_part())


@pytest.mark.parametrize("name", ["conv-2d", "resnet-block"])
def test_flops_are_those_of_torchs_own_convolutions(name):
    from torch.utils.flop_counter import FlopCounterMode

    part = map_part((6, 8, 8), (12, 4, 4))
    module = build(name, part).eval()
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(3, 6, 8, 8))
    assert module.flops(part, {"batch": 3}) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["conv-2d", "resnet-block"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_hidden_channels_start_with_mean_zero_and_variance_one_on_the_guides_activations(name, norm):
    part = map_part((6, 8, 8), (12, 4, 4))
    module = build(name, part, hidden_norm=norm).eval()
    x = 5 + 3 * torch.randn(64, 6, 8, 8)
    module.prepare(part, [(x[:32], x[:32]), (x[32:], x[32:])])
    conv = module.first if name == "resnet-block" else module.depthwise
    y = conv(module.places.place(x))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(y.shape[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(y.shape[1]), rtol=1e-3, atol=0)


def test_a_group_is_each_image_by_itself_and_all_of_its_channels():
    x = torch.tensor([0.0, 2.0, 5.0, 9.0]).view(1, 4, 1, 1) + torch.randn(3, 4, 6, 6)
    y = make_norm("group", 4)(x)
    torch.testing.assert_close(y, (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), correction=0, keepdim=True))


def test_windows_stand_where_a_padded_convolution_has_them():
    """Strides and 'same' padding of ResNets: 7 x 7 / 2, 3 x 3 / 2, 3 x 3, and an unpadded 5 x 5."""
    for size, kernel, stride, padding in ((224, 7, 2, 3), (56, 3, 2, 1), (14, 3, 1, 1), (28, 5, 1, 0), (7, 3, 2, 1)):
        x, taps = torch.randn(1, 1, size, size), torch.randn(1, 1, kernel, kernel)
        wanted = F.conv2d(x, taps, stride=stride, padding=padding)
        windows = Windows((size, size), wanted.shape[2:], kernel)
        found = F.conv2d(windows.place(x), taps, stride=windows.stride, padding=windows.padding)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_windows_of_a_map_that_is_no_square_are_each_sides_own():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    windows = Windows((8, 8), (8, 6), 1)  # a side is as a convolution has it, of the other both ends are left over
    found = F.conv2d(windows.place(x), torch.ones(1, 1, 1, 1), stride=windows.stride, padding=windows.padding)
    assert torch.equal(found, x[..., 1:-1])


def test_windows_crop_what_they_leave_over_at_both_ends():
    x = torch.arange(8.0).expand(1, 1, 8, 8)
    windows = Windows((8, 8), (4, 4), 1)
    assert windows.stride == (2, 2)
    cropped = Windows((8, 8), (6, 6), 1)
    assert cropped.place(x)[0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_averages_repeat_the_border():
    x = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7]]).expand(1, 1, 7, 7)
    found = Windows((7, 7), (4, 4), None).average(x)
    assert found[0, 0, 0].tolist() == [1, 2.5, 4.5, 6.5]
