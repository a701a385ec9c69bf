"""Narrower parts inside a network: chosen with data, refitted, exported.

B batch, T time, D width
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.distill.tools import batches_of
from tests.models import vectors
from tests.tolerances import VALUE, relative_error
from thesean.deploy.export import export
from thesean.distill.closed_form import solve_parts
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.mlp import find_mlp
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.record import record
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition
from thesean.targets import PartFacts, Target, build_module
from thesean.targets.shared.module import TargetModule


def narrowed(guide: Captured, **options: Any) -> Hybrid:
    """Every MLP of the guide narrowed, its neurons chosen with data."""
    values = record(guide.graph_module, guide.signature.random_inputs(probe_sizes(guide)))
    mlps = {p.path: find_mlp(p.region, values) for p in partition(data_flow(guide.graph_module.graph), "sublayer")}

    def build(part: PartFacts) -> nn.Module:
        facts = PartFacts(**{**vars(part), "mlp": mlps[part.path]})
        module = build_module(Target("narrow", **options), facts)
        assert isinstance(module, TargetModule)
        module.copy_from(facts)
        sizes = [inputs for _, inputs in batches_of(guide, 8)]
        (region,) = (
            p.region for p in partition(data_flow(guide.graph_module.graph), "sublayer") if p.path == part.path
        )
        ends = [region.entry.name, region.exit.name]
        activations = [intermediates(guide.graph_module, ends, with_output=False)(**inputs) for inputs in sizes]
        module.prepare(facts, [(a[ends[0]].detach(), a[ends[1]].detach()) for a in activations])
        return module

    found = {path: Target("narrowed", build=build) for path, facts in mlps.items() if facts is not None}
    return build_hybrid(make_plan(guide, found, granularity="sublayer"))


@torch.no_grad()
def error_of(hybrid: Hybrid, guide: Captured) -> float:
    ((_, inputs),) = batches_of(guide, 1, 32, seed=9)
    ours, theirs = hybrid.graph_module(**inputs), guide.graph_module(**inputs)
    if isinstance(ours, dict):
        name = next(iter(ours))
        return relative_error(ours[name], theirs[name])
    return relative_error(ours, theirs)


GUIDES = pytest.mark.parametrize("guide", [captured.gpt2, captured.bert, captured.llama, captured.encoder])


@pytest.mark.thorough
@GUIDES
def test_all_neurons_of_every_mlp_are_the_guide(guide):
    hybrid = narrowed(guide(), ratio=1)
    assert len(hybrid.replacements) == 2
    assert error_of(hybrid, guide()) < 10 * VALUE[torch.float32]  # two layers' rounding


@pytest.mark.thorough
@GUIDES
def test_half_of_the_neurons_stay_near_the_guide_and_more_of_them_nearer(guide):
    errors = [error_of(narrowed(guide(), ratio=ratio), guide()) for ratio in (0.25, 0.5, 0.9)]
    assert errors[2] < errors[1] < errors[0]


class Doubled(nn.Module):
    """x + MLP(x), twice; each neuron stands there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for up in self.ups:
                assert isinstance(up, nn.Linear)
                up.weight[12:], up.bias[12:] = up.weight[:12], up.bias[:12]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return self.head(x)


def test_half_of_doubled_neurons_are_the_guide_and_the_closed_form_leaves_it_at_that():
    guide = capture(models.seeded(Doubled), vectors(3, 6, 8))
    hybrid = narrowed(guide)
    assert error_of(hybrid, guide) < 10 * VALUE[torch.float32]
    inputs = [i for _, i in batches_of(guide, 8)]
    solve_parts(guide.graph_module, hybrid, [0, 1], inputs, ridge=1e-3, solve_copied=False)
    assert error_of(hybrid, guide) < 10 * VALUE[torch.float32]


def test_the_closed_form_solves_what_was_copied_and_corrects_earlier_parts():
    guide = captured.gpt2()
    hybrid = narrowed(guide)
    assert all("output" not in r.copied for r in hybrid.replacements)
    inputs = [i for _, i in batches_of(guide, 16)]
    before = error_of(hybrid, guide)
    assert len(solve_parts(guide.graph_module, hybrid, [0, 1], inputs, ridge=1e-3, solve_copied=False)) == 2
    assert error_of(hybrid, guide) < before


def test_fewer_heads_take_the_place_of_a_plain_attention():
    guide = captured.gpt2()
    hybrid = build_hybrid(make_plan(guide, Target("narrow-heads", ratio=1)))
    assert [r.copied for r in hybrid.replacements] == [("query", "key", "value")] * 2
    assert error_of(hybrid, guide) < 10 * VALUE[torch.float32]
    one = build_hybrid(make_plan(guide, "narrow-heads"))
    assert 0.01 < error_of(one, guide) < 1


@pytest.mark.thorough
@pytest.mark.parametrize("part", ["neurons", "heads"])
@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert])
def test_the_exported_file_equals_torch(guide, part, tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    one = guide(layers=1)
    hybrid = narrowed(one) if part == "neurons" else build_hybrid(make_plan(one, "narrow-heads"))
    report = export(hybrid.graph_module.eval(), one.signature, tmp_path / "narrow.onnx")
    assert report.stateful == (guide is captured.gpt2)  # whose attention remembers keys and values
    assert {(2, 19), (5, 3), (1, 1)} <= {check.shape for check in report.checks}
    assert max(check.max_abs_error for check in report.checks) < 1e-5


@pytest.mark.thorough
def test_a_gated_mlp_exports_too(tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    guide = captured.llama(layers=1)
    report = export(narrowed(guide).graph_module.eval(), guide.signature, tmp_path / "narrow.onnx")
    assert max(check.max_abs_error for check in report.checks) < 1e-5


class Idle(Doubled):
    """Half of the neurons give the same number whatever comes in: nothing of them is left but a bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for up in self.ups:
                assert isinstance(up, nn.Linear)
                up.weight[12:], up.bias[12:] = 0.0, 2.0


def test_neurons_that_never_move_are_folded_into_the_bias():
    guide = capture(models.seeded(Idle), vectors(3, 6, 8))
    hybrid = narrowed(guide)
    assert error_of(hybrid, guide) < 10 * VALUE[torch.float32]
