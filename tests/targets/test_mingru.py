from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.targets.build import build


def test_output_equals_the_equation_step_by_step(sequence_part):
    module = build("mingru", sequence_part()).double().eval()
    x_BTD = torch.randn(2, 6, 16, dtype=torch.float64)
    hidden = torch.zeros(2, 16, dtype=torch.float64)
    expected = []
    for x_BD in x_BTD.unbind(1):
        z = torch.sigmoid(module.gate(x_BD))
        hidden = (1 - z) * hidden + z * module.value(x_BD)
        expected.append(module.last(hidden * F.silu(module.output_gate(x_BD))))
    y_BTD, state = module(x_BTD)
    torch.testing.assert_close(y_BTD, torch.stack(expected, 1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, hidden, rtol=1e-10, atol=1e-12)


def test_the_backward_half_of_a_bidirectional_module_is_the_forward_one_in_a_mirror(sequence_part):
    module = build("mingru", sequence_part("bidirectional")).eval()
    with torch.no_grad():
        for linear in (module.gate, module.value, module.output_gate):
            linear.weight[16:] = linear.weight[:16]
            linear.bias[16:] = linear.bias[:16]
    x_BTD = torch.randn(2, 6, 16)
    ahead, _ = module.features(x_BTD)
    mirrored, _ = module.features(x_BTD.flip(1))
    torch.testing.assert_close(ahead[..., 16:], mirrored[..., :16].flip(1))


def test_gates_start_spread_over_memories_of_all_lengths(sequence_part):
    module = build("mingru", sequence_part("bidirectional"))
    for bias in module.gate.bias.detach().split(16):
        torch.testing.assert_close(bias.sort().values, torch.linspace(-5, 2, 16))


def test_value_projection_is_copied_from_the_guides_attention_as_often_as_it_fits(sequence_part, attention_facts):
    facts = attention_facts()
    part = sequence_part(attention=facts)
    module = build("mingru", part, width=40)
    before = module.value.weight.detach().clone()
    assert module.copy_from(part) == ("value",)
    torch.testing.assert_close(module.value.weight[:32].detach(), facts.value.weight_OI.repeat(2, 1), rtol=0, atol=0)
    torch.testing.assert_close(module.value.bias[16:32].detach(), facts.value.bias_O, rtol=0, atol=0)
    torch.testing.assert_close(module.value.weight[32:].detach(), before[32:], rtol=0, atol=0)


def test_nothing_is_copied_where_nothing_fits(sequence_part, attention_facts):
    assert build("mingru", sequence_part()).copy_from(sequence_part()) == ()
    part = sequence_part(attention=attention_facts())
    assert build("mingru", part, width=8).copy_from(part) == ()
