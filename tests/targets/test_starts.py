"""What modules begin with: projections whose outputs are as wide as what they read, so that no feature drowns another.

E channels, K taps of a convolution, B batch, T time
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.targets.build import build

# by family, the gain of each projection
GAINS = {
    "conv": {"value": 1.0, "gate": 1.0},
    "delta": {"query": 1.0, "key": 1.0, "value": 1.0},
    "linear-attention": {"query": 1.0, "key": 1.0, "value": 1.0},
    "ssm": {"value": 1.0, "gate": 0.7, "ahead.selection": 1.0, "ahead.step": 0.1},
}


@pytest.mark.parametrize("family", GAINS)
def test_projections_begin_with_outputs_as_wide_as_what_they_read(family, sequence_part):
    module = (
        build(family, sequence_part(width_in=128), heads=8)
        if family != "conv"
        else build(family, sequence_part(width_in=128))
    )
    for name, gain in GAINS[family].items():
        linear = module.get_submodule(name)
        found = linear.weight.std() * linear.in_features**0.5
        assert found.item() == pytest.approx(gain, rel=0.1), name


@pytest.mark.parametrize(
    ("mixing", "lookahead", "own"), [("causal", 0, 7), ("bidirectional", 0, 4), ("bidirectional", 3, 7)]
)
def test_of_a_convolutions_taps_the_own_step_is_the_loudest_and_all_add_up_to_one(
    mixing, lookahead, own, sequence_part
):
    """Seven steps before the own one, or as many on both sides, or those that are waited for after it."""
    options = {"lookahead": lookahead} if lookahead else {}
    taps_EK = build("conv", sequence_part(mixing, width_in=512), **options).taps_EK.detach()
    loudness_K = taps_EK.square().mean(0)
    assert loudness_K.argmax() == own
    torch.testing.assert_close(loudness_K.sum(), torch.tensor(1.0), rtol=0.1, atol=0)
    before, after = loudness_K[:own], loudness_K[own + 1 :]
    assert bool((before.diff() > 0).all())
    assert bool((after.diff() < 0).all())


def test_a_state_spaces_taps_begin_on_both_sides_of_zero_and_what_it_selects_has_no_offset(sequence_part):
    scan = build("ssm", sequence_part(width_in=128)).ahead
    taps_EW = scan.weight_EW.detach()
    assert taps_EW.mean().abs() < 0.1
    assert 0.45 < taps_EW.abs().max() <= 0.5
    assert not scan.selection(torch.zeros(1, 128)).any()


def test_gates_begin_open(sequence_part):
    for family in ("conv", "ssm"):
        gate = build(family, sequence_part()).gate
        assert torch.equal(F.silu(gate(torch.zeros(16))), F.silu(torch.ones(gate.out_features)))
