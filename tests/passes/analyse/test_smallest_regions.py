"""The smallest parts: a linear map each, with what belongs to it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.captured import flow_of
from thesean.passes.analyse.regions import is_linear_map, is_single_entry_single_exit
from thesean.passes.analyse.smallest_regions import smallest_regions
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition


def test_an_attention_falls_into_what_mixes_and_its_output_map_and_an_mlp_into_two():
    paths = [p.path for p in partition(flow_of(captured.gpt2()), "finest")]
    assert paths[:4] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc..act",
        "transformer.h.0.mlp.c_proj",
    ]
    assert len(paths) == 8


def test_a_convolution_takes_its_norm_and_activation_along():
    flow = flow_of(captured.resnet())
    (first, second, *_) = partition(flow, "finest")
    assert [str(n.target).split(".")[1] for n in first.region.nodes] == ["conv2d", "batch_norm", "relu"]
    assert [str(n.target).split(".")[1] for n in second.region.nodes] == ["conv2d", "batch_norm"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "encoder", "resnet", "convnet", "mlp", "functional"])
def test_pieces_are_single_entry_single_exit_disjoint_and_cover_the_halves(name):
    flow = flow_of(getattr(captured, name)())
    halves = partition(flow, "sublayer")
    pieces = [p.region for p in partition(flow, "finest")]
    assert all(is_single_entry_single_exit(flow, p) for p in pieces)
    covered = [n for p in pieces for n in p.nodes]
    assert len(covered) == len(set(covered))
    assert set(covered) == {n for h in halves for n in h.region.nodes}
    assert all(any(is_linear_map(n) for n in p.nodes) for p in pieces)


class Widening(nn.Module):
    """x_BD -> y_BD, by widths that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.maps(x)


def test_vectors_are_cut_after_every_map_whatever_its_width():
    flow = flow_of(capture(models.seeded(Widening), models.vectors(3, 4)))
    (whole,) = partition(flow, "sublayer")
    assert [p.exit.name for p in smallest_regions(flow, whole.region)] == ["relu", "relu_1", "linear_2"]


def test_pieces_follow_each_other():
    flow = flow_of(captured.llama())
    for half in partition(flow, "sublayer"):
        pieces = smallest_regions(flow, half.region)
        assert pieces[0].entry is half.region.entry
        assert pieces[-1].exit is half.region.exit
        assert all(a.exit is b.entry for a, b in itertools.pairwise(pieces))


def test_a_network_of_the_finest_parts_runs():
    guide = captured.bert()
    bound_plan = make_plan(guide, "mlp", granularity="finest", parts=None, keep=["*self*"])
    assert {p.target for p in bound_plan.plan} == {"mlp", "keep"}
    hybrid = build_hybrid(bound_plan)
    out = hybrid.graph_module(**guide.example)
    assert torch.isfinite(out["last_hidden_state"]).all()
