"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from tests import models
from tests.models import vectors
from tests.targets.build import build
from thesean.errors import TargetMismatchError
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan

MIXING = pytest.mark.parametrize("mixing", ["causal", "bidirectional"])


@MIXING
def test_only_bidirectional_mixers_see_the_future(mixing, sequence_part):
    module = build("mixer", sequence_part(mixing, time=9)).eval()
    assert not module.stateful
    x_BTD = torch.randn(2, 9, 16)
    moved_BTD = x_BTD.clone()
    moved_BTD[:, 4] += 1
    change_T = (module(moved_BTD) - module(x_BTD)).abs().amax((0, 2))
    if mixing == "causal":
        assert not change_T[:4].any()
    else:
        assert (change_T[:4] > 1e-6).all()
    assert (change_T[4:] > 1e-6).all()


def test_it_is_the_papers_token_mixing_beside_the_tokens_themselves(sequence_part):
    module = build("mixer", sequence_part("bidirectional", time=5), expand=3).eval()
    up, down = nn.Linear(5, 15), nn.Linear(15, 5)
    with torch.no_grad():
        module.first_MTT.copy_(up.weight.view(3, 5, 5))
        module.first_bias_MT.copy_(up.bias.view(3, 5))
        module.second_MTT.copy_(down.weight.view(5, 3, 5).transpose(0, 1))
        module.second_bias_T.copy_(down.bias)
    x_BTD = torch.randn(2, 5, 16)
    mixed_BTD = down(nn.functional.gelu(up(x_BTD.mT))).mT
    features_BTE, _ = module.features(x_BTD)
    torch.testing.assert_close(features_BTE, torch.cat([x_BTD, mixed_BTD], -1), rtol=1e-4, atol=1e-5)


@MIXING
@pytest.mark.parametrize("expand", [8, 32])
def test_mixed_steps_start_as_large_as_the_tokens_wherever_they_stand(mixing, expand, sequence_part):
    module = build("mixer", sequence_part(mixing, time=64), expand=expand)
    features_BTE, _ = module.features(torch.randn(64, 64, 16))
    deviation_T = features_BTE[..., 16:].detach().std((0, 2))
    assert (deviation_T > 0.1).all()
    assert (deviation_T < 2).all()


def test_as_a_whole_part_it_adds_its_input(sequence_part):
    module = build("mixer", sequence_part("causal", time=6), scope="part")
    x_BTD = torch.randn(2, 6, 16)
    torch.testing.assert_close(module(x_BTD), module.last(module.features(x_BTD)[0]) + x_BTD)


def test_a_sequence_of_any_length_is_refused_with_a_way_to_fix_it(sequence_part):
    message = r"^layers\.0: target 'mixer' expected a sequence of one fixed length, found \(batch, time, 16\).*reshapes"
    with pytest.raises(TargetMismatchError, match=message):
        build("mixer", sequence_part())


def test_a_guide_that_is_wrapped_as_the_refusal_says_can_be_converted():
    guide = models.token_mixer()
    with pytest.raises(TargetMismatchError, match="fixed length"):
        thesean.plan(guide, "mixer", example_inputs=vectors(3, 6, 8))
    captured = capture(models.FixedLength(guide, 6, 8), vectors(3, 6, 8))
    hybrid = build_hybrid(make_plan(captured, "mixer")).graph_module
    assert hybrid(vectors(5, 6, 8)).shape == (5, 6, 8)


def test_flops_count_both_products_over_time(sequence_part):
    part = sequence_part("causal", time=6)
    module = build("mixer", part, expand=3)
    assert module.flops(part, {"batch": 2}) == 2 * 2 * (2 * 3 * 36 * 16 + 6 * 32 * 16)


@MIXING
def test_loss_falls_on_a_toy_part(mixing, sequence_part):
    module = build("mixer", sequence_part(mixing, time=12))
    x_BTD = torch.randn(16, 12, 16)
    mean_BTD = x_BTD.cumsum(1) / torch.arange(1, 13).view(-1, 1)
    wanted_BTD = mean_BTD if mixing == "causal" else x_BTD.mean(1, keepdim=True).expand_as(x_BTD)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (module(x_BTD) - wanted_BTD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
