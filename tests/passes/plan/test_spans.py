from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.convnets import network
from thesean.errors import PlanError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.make_plan import bind_plan, make_plan
from thesean.passes.plan.plan import Plan
from thesean.targets import Target


def guide(name: str) -> Captured:
    model, shape = network(name)
    return capture(model, torch.randn(2, *shape))


def parts(captured: Captured, target: Any = "narrow", **division: Any) -> list[str]:
    return [p.path for p in make_plan(captured, target, **division).plan.parts]


@pytest.mark.parametrize("target", ["narrow", "narrow-channels", Target("narrow", scope="part", ratio=0.5)])
def test_plain_convolutions_in_a_row_are_one_part(target):
    (row,) = make_plan(guide("plain"), target).plan.parts
    assert (row.path, row.members) == ("0..9", ("0..4", "5..9"))
    assert row.target == (target if isinstance(target, str) else target.name)
    assert row.new_flops < 0.9 * row.flops


def test_depthwise_and_pointwise_convolutions_in_a_row_are_plain():
    (row,) = make_plan(guide("separable"), "narrow").plan.parts
    assert row.new_params < 0.5 * row.params


def test_linear_maps_of_vectors_in_a_row_are_plain():
    (row,) = make_plan(guide("vectors"), "narrow").plan.parts
    assert len(row.members) == 3
    assert row.new_params < 0.6 * row.params


def test_perceptrons_of_vectors_keep_to_themselves():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2)]
    plan = make_plan(capture(nn.Sequential(*blocks, nn.Linear(8, 3)).eval(), torch.randn(4, 8)), "narrow").plan
    assert [p.members for p in plan.parts] == [(), ()]


def test_a_norm_behind_an_activation_is_no_second_layer():
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in ((10, 64), (64, 32)):
        layers += [nn.Linear(into, out), nn.ReLU(), nn.BatchNorm1d(out)]
    (row,) = make_plan(
        capture(nn.Sequential(*layers, nn.Linear(32, 3)).eval(), torch.randn(4, 10)), "narrow"
    ).plan.parts
    assert row.members == ("0..2", "3..5")
    assert row.new_params < 0.6 * row.params


def test_what_no_channels_can_go_from_between_is_told_part_by_part():
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in ((8, 16), (16, 8)):
        layers += [nn.ConvTranspose2d(into, out, 4, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1)).eval()
    with pytest.raises(PlanError, match="it has no channels but its input's and its output's"):
        make_plan(capture(model, torch.randn(2, 8, 2, 2)), "narrow")


class Framed(nn.Module):
    """Each step is convolved and mapped by itself, then all are read by a recurrence: x_BTD -> y_BT3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.map = nn.Conv1d(1, 2, 5), nn.Linear(16, 12)
        self.lstm, self.out = nn.LSTM(12, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        y = nn.functional.max_pool1d(self.conv(x.reshape(-1, width).unsqueeze(1)).relu(), 2)
        y = self.map(y.view(-1, 16)).reshape(batch, time, 12)
        return self.out(self.lstm(y)[0])


def test_a_row_ends_where_it_can_no_longer_be_read():
    parts = make_plan(capture(Framed().eval(), torch.randn(2, 7, 20)), "narrow").plan.parts
    assert [(p.path, p.members, p.target) for p in parts] == [
        ("conv", (), "keep"),
        ("map", (), "keep"),
        ("lstm", (), "narrow"),
    ]


@pytest.mark.parametrize("name", ["basic", "pre-activated", "next", "over time"])
def test_residual_blocks_stay_by_themselves(name):
    assert len(parts(guide(name))) == 2


def test_other_targets_keep_their_parts():
    assert parts(guide("plain"), "conv") == ["0..4", "5..9"]


def test_parts_that_are_named_are_as_they_are_named():
    plain = guide("plain")
    assert parts(plain, {"0..4": "narrow", "5..9": "narrow"}) == ["0..4", "5..9"]
    assert parts(guide("separable"), parts=["body"]) == ["body"]


def test_what_is_kept_stays_out():
    plan = make_plan(guide("plain"), "narrow", keep="5..9").plan
    assert [(p.path, p.target) for p in plan.parts] == [("0..4", "narrow"), ("5..9", "keep")]


def test_a_plan_that_was_written_down_is_bound_again():
    plain = guide("plain")
    plan = make_plan(plain, "narrow").plan
    again = bind_plan(plain, Plan.from_yaml(plan.to_yaml())).plan
    assert again.parts == plan.parts


def test_blocks_with_nothing_inside_tell_why():
    with pytest.raises(PlanError, match=r"of its channels it can't take any: square.default is not among what"):
        make_plan(guide("squared"), "narrow")
    with pytest.raises(PlanError, match=r"it has no channels but its input's and its output's"):
        make_plan(guide("separable"), "narrow", keep=[f"body.{k}*" for k in (2, 3, 4, 5, 6)])


@pytest.mark.parametrize(("ratio", "told"), [(0.75, True), (0.5, False)])
def test_where_no_channel_goes_the_plan_says_so(ratio: float, told: bool):
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into in (3, 16):
        layers += [nn.Conv2d(into, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    plan = make_plan(capture(model, torch.randn(2, 3, 8, 8)), Target("narrow", ratio=ratio)).plan
    assert any("no channel goes" in note for note in plan.notes) == told
