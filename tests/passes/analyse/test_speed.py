"""C channels"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import captured
from tests.models import vectors
from tests.targets.build import build
from tests.targets.contract import feature_map, sequence
from tests.targets.spatial_parts import map_part
from thesean.deploy.timing.plan import measure_plan
from thesean.passes.analyse.speed import G_PER_S, time_of_module, time_of_nodes
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import PartFacts, State, Target, TargetModule

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "operators.json"


def outline(name: str, part: PartFacts, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build(name, part, **options)  # type: ignore[arg-type]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(2))
        self.inner = nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), second, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.inner(x)).relu()


@cache
def blocks(channels: int = 16) -> Captured:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, channels, 3, 1, 1), Block(channels), Block(channels)]
    return capture(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)).eval(),
                   vectors(2, 3, 8, 8))  # fmt: skip


def test_a_module_takes_the_time_of_its_operators():
    pixels, part = 64, map_part((16, 8, 8), params=2 * 9 * 16 * 16)
    dense = time_of_module(outline("resnet-block", part), (1, 16, 8, 8))
    assert dense == pytest.approx(2 * 2 * pixels * 9 * 16 * 16 / (G_PER_S["dense"] * 1e9))
    convolved = time_of_module(outline("conv", part), (1, 16, 8, 8))
    spread, pointwise = 2 * pixels * 25 * 64, 2 * pixels * 64 * 16
    assert convolved == pytest.approx(1e-9 * (spread / G_PER_S["grouped"] + pointwise / G_PER_S["dense"]))
    one_a_channel = time_of_module(outline("conv", part, expand=1), (1, 16, 8, 8))
    assert one_a_channel is not None
    assert convolved is not None
    assert one_a_channel < convolved / 4


def test_a_guides_nodes_take_as_long_as_the_module_of_the_same_operators():
    (part, *_) = make_plan(blocks(), "resnet-block").parts
    assert part.slowdown == pytest.approx(1.0)


def test_elements_count_where_there_are_no_flops_and_views_do_not():
    guide = capture(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 2)),
                    vectors(3, 4))  # fmt: skip
    nodes = [n for n in guide.graph_module.graph.nodes if n.op == "call_function"]
    assert time_of_nodes(nodes, {}, lambda node: 10) == pytest.approx(3 * 10 / (G_PER_S["elementwise"] * 1e9))


def test_nothing_is_said_of_recurrences_and_attentions():
    assert time_of_module(outline("gru", sequence("causal")), (1, 12, 16)) is None
    assert time_of_module(outline("mingru", sequence("bidirectional")), (1, 12, 16)) is None
    assert time_of_module(nn.Linear(4, 4, device="meta"), (1, 4)) is None
    assert time_of_module(outline("linear", feature_map()), (1, 6, 8, 8)) is not None
    assert all(p.slowdown is None for p in make_plan(captured.gpt2(), "rnn").parts)


class ReadsValues(TargetModule):
    family = "reads-values"

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


def test_nothing_is_said_of_a_module_that_reads_values():
    assert time_of_module(ReadsValues(), (1, 4)) is None


def test_a_plan_warns_of_fewer_flops_that_take_longer_and_of_maps_that_grow():
    plan = make_plan(blocks(), "conv").plan
    assert plan.new_flops < plan.flops
    (note,) = plan.notes
    assert note.startswith("1, 2 should get slower, ")
    assert "Measure it" in note
    assert make_plan(blocks(), "bottleneck").plan.notes == ()
    grown = make_plan(captured.gpt2(), {"*.mlp.c_proj": Target("mlp")}, granularity="finest").plan
    assert any("should get slower" in note for note in grown.notes)


@pytest.mark.slow
def test_what_was_supposed_gives_way_to_what_was_measured():
    bound_plan = make_plan(blocks(), "conv")
    assert any("should get slower" in note for note in bound_plan.plan.notes)
    assert not any("should get slower" in note for note in measure_plan(bound_plan, batches=[1]).notes)


def test_the_rates_are_those_that_were_measured():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
    for kind, rate in G_PER_S.items():
        names = ("matmul", "convolution") if kind == "dense" else (kind,)
        found = [row["g_per_s"] for row in rows if row["name"].startswith(names)]
        assert 0.7 * min(found) <= rate <= 1.3 * max(found), kind


def test_groups_are_read_off_either_operator_of_convolutions():
    with FakeTensorMode():
        image, weight = torch.empty(1, 8, 4, 4), torch.empty(8, 1, 3, 3)
    nodes = []
    for operator, last in (
        (torch.ops.aten.conv2d.default, ([1, 1], [1, 1], [1, 1], 8)),
        (torch.ops.aten.convolution.default, ([1, 1], [1, 1], [1, 1], False, [0, 0], 8)),
    ):
        graph = fx.Graph()
        x, w = graph.placeholder("x"), graph.placeholder("w")
        x.meta["val"], w.meta["val"] = image, weight
        nodes.append(graph.call_function(operator, (x, w, None, *last)))
    taken = [time_of_nodes([n], {n: 10**6}, lambda n: 1) for n in nodes]
    assert taken == [pytest.approx(1e-3 / G_PER_S["depthwise"])] * 2
