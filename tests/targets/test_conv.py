"""B batch, T time, D width, E channels, K taps, R steps of memory"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.targets.build import build
from tests.targets.spatial_parts import map_part
from thesean.errors import ArtifactError, TargetMismatchError
from thesean.targets import PartFacts, rebuild

CAUSAL: dict[str, Any] = {"kernel": 4, "dilations": [1, 3]}


def test_a_sequence_becomes_conv_1d_and_a_feature_map_conv_2d(sequence_part):
    assert build("conv", sequence_part()).family == "conv-1d"
    assert build("conv", map_part((6, 8, 8))).family == "conv-2d"
    with pytest.raises(ArtifactError, match="'conv' picks another family"):
        rebuild("conv", {})


def test_options_reach_the_family_that_was_picked(sequence_part):
    assert build("conv", sequence_part(), **CAUSAL).config()["dilations"] == [1, 3]
    assert build("conv", map_part((6, 8, 8)), kernel=7).config()["kernel"] == 7
    with pytest.raises(TargetMismatchError, match=r"'conv-2d': option 'dilations'.*known options: kernel, expand"):
        build("conv", map_part((6, 8, 8)), dilations=[1])


def test_a_vector_is_refused_and_told_of_mlp():
    part = PartFacts(path="head", input_shape=("batch", 4), output_shape=("batch", 4), mixing="none", params=1)
    with pytest.raises(TargetMismatchError, match=r"^head: target 'conv' expected a sequence .* Choose target 'mlp'"):
        build("conv", part)


@pytest.mark.parametrize("name", ["conv", "conv-1d"])
def test_asked_for_a_whole_part_it_brings_norm_and_shortcut(name, sequence_part):
    module = build(name, sequence_part(), scope="part")
    assert module.residual
    assert module.norm is not None
    assert not build(name, sequence_part()).residual


@pytest.mark.parametrize("name", ["conv", "conv-2d"])
def test_asked_for_a_whole_feature_map_it_is_as_without_asking(name):
    part = map_part((6, 8, 8))
    assert build(name, part, scope="part").config() == build(name, part).config()
    branch = map_part((6, 8, 8), is_branch=True)
    assert build(name, branch, scope="part").config()["shortcut"] == "none"


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_outputs_are_gated_weighted_sums_of_each_channels_own_window(mixing, sequence_part):
    """Worked out step by step and tap by tap."""
    module = build("conv-1d", sequence_part(mixing), width=5, kernel=3, dilations=[1, 3]).eval()
    x_BTD = torch.randn(2, 9, 16)
    value_BTE, gate_BTE = module.value(x_BTD), F.silu(module.gate(x_BTD))
    expected_BTE = torch.zeros(2, 9, 5)
    for e in range(5):
        dilation = 1 if e < 3 else 3  # five channels: three for the first dilation, two for the second
        for t in range(9):
            for k in range(3):
                s = t + dilation * (k - (2 if mixing == "causal" else 1))
                if 0 <= s < 9:
                    expected_BTE[:, t, e] += module.taps_EK[e, k] * value_BTE[:, s, e]
    torch.testing.assert_close(module.features(x_BTD)[0], expected_BTE * gate_BTE, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1, 5, 1, 13), (20,), (1,) * 20, (19, 1)])
@pytest.mark.parametrize("options", [{}, CAUSAL, {"scope": "part"}], ids=["default", "dilated", "whole part"])
def test_steps_in_chunks_of_any_size_equal_all_steps_at_once(chunks, options, sequence_part):
    module = build("conv", sequence_part(), **options).eval()
    x_BTD = torch.randn(3, 20, 16)
    full_BTD, full_state = module(x_BTD)
    outputs, state = [], None
    for chunk_BTD in x_BTD.split(chunks, dim=1):
        y_BTD, state = module(chunk_BTD, state)
        outputs.append(y_BTD)
    torch.testing.assert_close(torch.cat(outputs, 1), full_BTD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, full_state, rtol=1e-5, atol=1e-6)


def test_the_state_is_the_last_values_and_zeros_start_a_sequence(sequence_part):
    module = build("conv", sequence_part(), **CAUSAL).eval()
    x_BTD = torch.randn(2, 20, 16)
    y_BTD, state_BRE = module(x_BTD)
    torch.testing.assert_close(state_BRE, module.value(x_BTD)[:, -9:], rtol=1e-5, atol=1e-6)
    zeros = module.initial_state(x_BTD)
    assert zeros.shape == (2, 9, 16)
    torch.testing.assert_close(module(x_BTD, zeros)[0], y_BTD, rtol=0, atol=0)


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_a_window_ends_where_the_kernel_does_and_only_bidirectional_ones_look_ahead(mixing, sequence_part):
    module = build("conv", sequence_part(mixing), kernel=3, dilations=[2]).eval()
    x_BTD = torch.randn(2, 15, 16)
    moved_BTD = x_BTD.clone()
    moved_BTD[:, 7] += 1

    def run(x: torch.Tensor) -> torch.Tensor:
        return module(x)[0] if module.stateful else module(x)

    change_T = (run(moved_BTD) - run(x_BTD)).abs().amax((0, 2))
    seen = [7, 9, 11] if mixing == "causal" else [5, 7, 9]
    assert (change_T > 1e-6).nonzero().flatten().tolist() == seen


def test_an_even_kernel_gets_one_tap_more_where_windows_are_centred(sequence_part):
    assert build("conv-1d", sequence_part("bidirectional"), kernel=4).kernel == 5
    assert build("conv-1d", sequence_part("bidirectional"), kernel=5).kernel == 5
    assert build("conv-1d", sequence_part("causal"), kernel=4).kernel == 4


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_initial_taps_are_loudest_at_the_step_itself(mixing, sequence_part):
    taps_EK = build("conv-1d", sequence_part(mixing, width_in=512), kernel=9).taps_EK
    loudness_K = taps_EK.detach().square().mean(0).sqrt()
    assert loudness_K.argmax() == (8 if mixing == "causal" else 4)
    torch.testing.assert_close(taps_EK.detach().square().sum(1).mean(), torch.tensor(1.0), rtol=0.1, atol=0)


def test_width_follows_the_option_or_a_multiple_of_the_part(sequence_part):
    assert build("conv", sequence_part()).last.in_features == 16
    assert build("conv", sequence_part(), expand=3).last.in_features == 48
    assert build("conv", sequence_part(), width=5).last.in_features == 5
    assert build("conv", map_part((6, 8, 8), (6, 8, 8)), expand=2).last.in_features == 12


def test_the_guides_value_projection_is_copied(sequence_part, attention_facts):
    facts = attention_facts()
    part = sequence_part(attention=facts)
    module = build("conv", part, expand=2)
    assert module.copy_from(part) == ("value",)
    torch.testing.assert_close(module.value.weight, facts.value.weight_OI.repeat(2, 1), rtol=0, atol=0)
    assert build("conv", sequence_part()).copy_from(sequence_part()) == ()


def test_more_dilations_than_channels_are_refused(sequence_part):
    with pytest.raises(TargetMismatchError, match=r"found dilations \[1, 2, 4\] for 2 channels.*larger width"):
        build("conv", sequence_part(), width=2, dilations=[1, 2, 4])
    for dilations in ([0], [2, 0]):
        with pytest.raises(TargetMismatchError, match="expected dilations of 1 or more"):
            build("conv", sequence_part(), dilations=dilations)


def test_flops_count_the_taps_of_every_token(sequence_part):
    part = sequence_part()
    module = build("conv-1d", part, width=8, kernel=4)
    assert module.flops(part, {"batch": 3, "time": 10}) == 2 * 30 * (8 * 16 + 8 * 16 + 8 * 4 + 16 * 8)


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_loss_falls_on_a_toy_part(mixing, sequence_part):
    module = build("conv", sequence_part(mixing))
    x_BTD = torch.randn(16, 12, 16)
    neighbour_BTD = x_BTD.roll(1 if mixing == "causal" else -1, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        out = module(x_BTD)
        loss = (out[0] if module.stateful else out).sub(neighbour_BTD)[:, 1:-1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
