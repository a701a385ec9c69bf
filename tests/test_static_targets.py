"""A small residual network becomes other networks that need no state: nearer to the guide from the closed form on.

B batch, C channels, H height, W width
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thesean
from tests import captured, models
from thesean.distill.closed_form import solve_parts
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.recipe import Recipe
from thesean.targets import Target

CLASSES = 4


def strokes(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits-like images 8 x 8: a line across, down or along either diagonal, shifted, with noise. x_B1HW, y_B."""
    generator = torch.Generator().manual_seed(seed)
    lines = torch.stack([torch.eye(8), torch.eye(8).flip(1), torch.zeros(8, 8), torch.zeros(8, 8)])
    lines[2, 3], lines[3, :, 3] = 1.0, 1.0
    label = torch.randint(0, CLASSES, (batch,), generator=generator)
    shift = torch.randint(-2, 3, (batch, 2), generator=generator)
    image = torch.stack([lines[k].roll(tuple(s), (0, 1)) for k, s in zip(label.tolist(), shift.tolist(), strict=True)])
    return (image + 0.3 * torch.randn(image.shape, generator=generator)).unsqueeze(1), label


DATA = [strokes(32, seed) for seed in range(48)]
HELD_OUT = [strokes(128, 100 + seed) for seed in range(2)]


@cache
def guide() -> nn.Module:
    """Trained until it tells them apart."""
    model = models.resnet(channels=(8, 16, 16), classes=CLASSES).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for image, label in DATA:
        optimizer.zero_grad()
        F.cross_entropy(model(image), label).backward()
        optimizer.step()
    model.eval()
    image, label = HELD_OUT[0]
    assert (model(image).argmax(1) == label).float().mean() > 0.9
    return model


def convert(target: Any, steps: int, solve: bool) -> thesean.Converted:
    fast = Recipe.named("fast")
    recipe = fast.model_copy(
        update={
            "steps": steps,
            # of all that there is so little would be left to train that ninety steps hardly show
            "closed_form": fast.closed_form.model_copy(update={"enabled": solve, "batches": 16}),
            # a high rate would first damage what the closed form found
            "fine_tuning": fast.fine_tuning.model_copy(update={"share": 1.0, "learning_rate": 1e-3}),
        }
    )
    # no loss: match the guide's outputs, which is what divergence measures
    return thesean.compile(guide(), target, data=DATA, eval_data=HELD_OUT, recipe=recipe, progress=False)


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["conv", "conv-2d", "resnet-block", "mlp", "linear"])
def test_divergence_falls_by_the_closed_form_and_then_by_training(target):
    raw = convert(target, 0, solve=False).report.converted["divergence"]
    report = convert(target, 90, solve=True).report  # near the guide the first steps may lead away
    solved, trained = report.stages[-1].divergence, report.converted["divergence"]
    assert raw is not None
    assert trained is not None
    assert solved < 0.5 * raw
    assert trained < 0.9 * solved


@torch.no_grad()
def errors(hybrid: Any, image: torch.Tensor) -> list[float]:
    """Relative squared error at each part's exit."""
    theirs = captured.resnet().graph_module
    found = []
    for own, exit_ in hybrid.boundaries:
        y = intermediates(hybrid.graph_module, [own], with_output=False)(image=image)[own]
        g = intermediates(theirs, [exit_], with_output=False)(image=image)[exit_]
        found.append(float((y - g).square().sum() / g.square().sum()))
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["conv", "conv-2d", "resnet-block", "linear"])
def test_the_closed_form_brings_every_part_of_a_residual_network_nearer(target):
    torch.manual_seed(0)
    hybrid = build_hybrid(make_plan(captured.resnet(), target))
    hybrid.graph_module.eval()
    before = errors(hybrid, models.vectors(64, 1, 8, 8, seed=9))
    inputs = [{"image": models.vectors(32, 1, 8, 8, seed=k)} for k in range(8)]
    solved = solve_parts(captured.resnet().graph_module, hybrid, range(len(hybrid.parts)), inputs, ridge=1e-3)
    assert solved == [r.name for r in hybrid.replacements]
    after = errors(hybrid, models.vectors(64, 1, 8, 8, seed=9))
    assert all(a < b for a, b in zip(after, before, strict=True)), (before, after)


def test_a_block_that_has_the_guides_first_convolution_finds_the_second_one():
    """Channels last and back: with the guide's own hidden map to read, nothing is left to explain."""
    network = captured.resnet()
    kept = ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.5"]
    hybrid = build_hybrid(make_plan(network, "resnet-block", keep=kept, granularity="sublayer"))
    hybrid.graph_module.eval()
    theirs, module = models.resnet().blocks[3], hybrid.graph_module.part_0
    with torch.no_grad():
        module.first.weight.copy_(theirs.conv1.weight)
        module.first.bias.zero_()
        module.norm.load_state_dict(theirs.bn1.state_dict())
    inputs = [{"image": models.vectors(64, 1, 8, 8, seed=k)} for k in range(8)]
    solve_parts(network.graph_module, hybrid, [0], inputs, ridge=1e-9)
    assert errors(hybrid, models.vectors(16, 1, 8, 8, seed=9))[0] < 1e-6


@pytest.mark.thorough
def test_conv_replaces_the_branches_of_blocks_and_whole_blocks_where_a_stage_changes():
    def are_branches(target: str) -> dict[str, bool]:
        bound_plan = make_plan(captured.resnet(), target)
        return {site.facts.path: site.facts.is_branch for part in bound_plan.parts for site in part.sites}

    blocks = [f"blocks.{k}" for k in range(6)]
    widening = {"blocks.2", "blocks.4"}  # their shortcuts are convolutions too
    assert are_branches("conv") == {path: path not in widening for path in blocks}
    assert are_branches("conv-2d") == dict.fromkeys(blocks, False)
    whole = thesean.plan(guide(), "conv-2d", data=DATA)
    assert all(p.new_params < p.params for p in whole if p.path != "blocks.0")


@pytest.mark.thorough
def test_several_blocks_become_one_whose_stride_is_theirs_together():
    plan = thesean.plan(guide(), "resnet-block", data=DATA, merge=2)
    assert len(plan.parts) == 3
    converted = thesean.compile(guide(), data=DATA, eval_data=HELD_OUT, plan=plan, recipe="fast", progress=False)
    strides = [converted.module.get_submodule(f"part_{k}").places.stride for k in range(3)]
    assert strides == [(1, 1), (2, 2), (2, 2)]
    assert converted.report.converted["divergence"] is not None
    assert converted(DATA[0][0]).shape == (32, CLASSES)


def test_a_block_after_a_relu_ends_in_one_and_a_branch_does_not():
    hybrid = build_hybrid(make_plan(captured.resnet(), "resnet-block"))
    assert all(hybrid.module(r).final_relu for r in hybrid.replacements)
    branches = build_hybrid(make_plan(captured.resnet(), Target("resnet-block"), granularity="sublayer"))
    kinds = {hybrid_part.facts.is_branch: branches.module(hybrid_part) for hybrid_part in branches.replacements}
    assert not kinds[True].final_relu
    assert kinds[True].shortcut == "none"
    assert kinds[False].shortcut == "projection"
