"""B batch, T time, D width, E channels, H heads, P channels of a head, N states of a channel"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.targets.build import build
from thesean.errors import TargetMismatchError
from thesean.targets import get_family
from thesean.targets.shared.family import parse_options


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_output_equals_the_equations_step_by_step(heads, sequence_part):
    module = build("ssm", sequence_part(), width=8, heads=heads, state=3).double().eval()
    scan = module.ahead
    with torch.no_grad():
        for p in scan.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x_BTD = torch.randn(2, 7, 16, dtype=torch.float64)
    value_BTE, gate_BTE = module.value(x_BTD), F.silu(module.gate(x_BTD))
    hidden_BEN = torch.zeros(2, 8, 3, dtype=torch.float64)
    expected = []
    for t in range(7):
        seen = [value_BTE[:, t - lag] * scan.weight_EW[:, 3 - lag] for lag in range(min(t + 1, 4))]
        u_BE = F.silu(scan.bias_E + sum(seen))
        b_BN, c_BN = (z / z.square().mean(-1, keepdim=True).sqrt() for z in scan.selection(u_BE).split(3, -1))
        step_BE = F.softplus(scan.step(u_BE)).repeat_interleave(8 // heads, -1)
        rate_EN = -scan.rate_HN.exp().repeat_interleave(8 // heads, 0)
        hidden_BEN = torch.exp(step_BE.unsqueeze(-1) * rate_EN) * hidden_BEN
        hidden_BEN = hidden_BEN + (step_BE * u_BE).unsqueeze(-1) * b_BN.unsqueeze(1)
        y_BE = (hidden_BEN * c_BN.unsqueeze(1)).sum(-1) + scan.direct_E * u_BE
        expected.append(module.last(y_BE * gate_BTE[:, t]))
    y_BTD, (window_BRE, scan_BHNP) = module(x_BTD)
    torch.testing.assert_close(y_BTD, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(window_BRE, value_BTE[:, -3:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scan_BHNP.transpose(2, 3).flatten(1, 2), hidden_BEN, rtol=1e-4, atol=1e-5)


def test_the_state_is_a_window_and_the_scans_states(sequence_part):
    module = build("ssm", sequence_part(width_in=64), state=5)
    window_BRE, scan_BHNP = module.initial_state(torch.zeros(3, 1, 64))
    assert window_BRE.shape == (3, 3, 64)
    assert scan_BHNP.shape == (3, 2, 5, 32)


def test_rates_start_as_the_first_integers_and_steps_as_spread_memories(sequence_part):
    module = build("ssm", sequence_part(width_in=64), state=4, memory=(2.0, 50.0))
    torch.testing.assert_close(module.ahead.rate_HN.exp().detach(), torch.tensor([1.0, 2, 3, 4]).expand(2, 4))
    torch.testing.assert_close(1 / F.softplus(module.ahead.step.bias.detach()), torch.tensor([2.0, 50.0]))


def test_the_backward_scan_of_a_bidirectional_module_is_the_forward_one_in_a_mirror(sequence_part):
    module = build("ssm", sequence_part("bidirectional")).eval()
    module.back.load_state_dict(module.ahead.state_dict())
    with torch.no_grad():
        for linear in (module.value, module.gate):
            linear.weight[16:] = linear.weight[:16]
    x_BTD = torch.randn(2, 6, 16)
    ahead, _ = module.features(x_BTD)
    mirrored, _ = module.features(x_BTD.flip(1))
    torch.testing.assert_close(ahead[..., 16:], mirrored[..., :16].flip(1))


def test_the_scan_grows_with_its_input_and_not_with_its_cube(sequence_part):
    module = build("ssm", sequence_part()).eval()
    with torch.no_grad():
        module.ahead.step.weight.zero_()
    x_BTE = torch.randn(2, 30, 16).abs() + 5
    with torch.no_grad():
        module.ahead.weight_EW.abs_()  # far from where silu bends
        once, _ = module.ahead(x_BTE, module.ahead.zeros(x_BTE))
        tenfold, _ = module.ahead(10 * x_BTE, module.ahead.zeros(x_BTE))
    assert 8 < (tenfold.norm() / once.norm()).item() < 12


def test_value_projection_is_copied_from_the_guides_attention_as_often_as_it_fits(sequence_part, attention_facts):
    facts = attention_facts()
    part = sequence_part(attention=facts)
    module = build("ssm", part, expand=2)
    assert module.copy_from(part) == ("value",)
    assert torch.equal(module.value.weight.detach(), facts.value.weight_OI.repeat(2, 1))
    assert torch.equal(module.value.bias.detach(), facts.value.bias_O.repeat(2))
    assert build("ssm", sequence_part()).copy_from(sequence_part()) == ()


def test_heads_that_do_not_divide_the_width_are_refused(sequence_part):
    with pytest.raises(TargetMismatchError, match=r"layers.0: .* found width 16 with 3 heads\. Set heads=1"):
        build("ssm", sequence_part(), heads=3)


@pytest.mark.parametrize("option", ["state", "heads", "expand"])
def test_an_option_of_zero_is_refused(option):
    with pytest.raises(TargetMismatchError, match=f"option '{option}': Input should be greater than 0"):
        parse_options(get_family("ssm"), {option: 0})
