"""Elman, GRU and LSTM: widths and the initial weights that carry memory."""

from __future__ import annotations

import pytest
import torch

from tests.targets.build import build
from tests.targets.contract import recurrent_families
from thesean.errors import TargetMismatchError
from thesean.targets.shared.torch_cell import orthogonal_recurrence


@pytest.mark.parametrize("name", ["elman", "gru", "lstm", "mingru", "ssm"])
def test_width_follows_the_option_or_a_multiple_of_the_part(name, sequence_part):
    assert build(name, sequence_part()).last.in_features == 16
    assert build(name, sequence_part(), expand=3).last.in_features == 48
    assert build(name, sequence_part(), width=5).last.in_features == 5
    assert build(name, sequence_part("bidirectional"), width=5).last.in_features == 10


@pytest.mark.parametrize("name", recurrent_families())
def test_a_width_of_zero_is_refused(name, sequence_part):
    with pytest.raises(TargetMismatchError, match="option 'width': Input should be greater than 0"):
        build(name, sequence_part(), width=0)


@pytest.mark.parametrize("name", ["delta", "ssm", "reservoir"])
def test_a_memory_of_no_token_is_refused(name, sequence_part):
    with pytest.raises(TargetMismatchError, match=r"option 'memory\.0': Input should be greater than 0"):
        build(name, sequence_part(), memory=(0.0, 3.0))


@pytest.mark.parametrize(("name", "gain"), [("elman", 0.95), ("gru", 1.0), ("lstm", 1.0)])
def test_recurrent_matrices_start_orthogonal(name, gain, sequence_part):
    core = build(name, sequence_part("bidirectional")).core
    for weight in (core.weight_hh_l0, core.weight_hh_l0_reverse):
        for gate in weight.detach().split(16):
            torch.testing.assert_close(gate @ gate.T, gain**2 * torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_memory_gates_start_spread(name, sequence_part):
    core = build(name, sequence_part()).core
    torch.testing.assert_close(core.bias_hh_l0.detach()[16:32], torch.linspace(-1, 4, 16))


def test_an_lstm_carries_hidden_and_cell_side_by_side(sequence_part):
    module = build("lstm", sequence_part(), width=3).eval()
    x_BTD = torch.randn(2, 4, 16)
    _, (hidden, cell) = module.core(x_BTD)
    torch.testing.assert_close(module(x_BTD)[1], torch.cat([hidden[0], cell[0]], -1))


@pytest.mark.parametrize(("make", "gates"), [(torch.nn.RNN, 1), (torch.nn.GRU, 3), (torch.nn.LSTM, 4)])
def test_each_gates_recurrent_matrix_is_orthogonal_and_nothing_else_is_touched(make, gates):
    core = make(5, 4, bidirectional=True)
    before = {name: value.clone() for name, value in core.named_parameters()}
    orthogonal_recurrence(core, 0.5)
    for name, value in core.named_parameters():
        if not name.startswith("weight_hh"):
            assert torch.equal(value, before[name])
            continue
        for gate in value.detach().unflatten(0, (gates, 4)):
            torch.testing.assert_close(gate @ gate.T, 0.25 * torch.eye(4), rtol=1e-5, atol=1e-6)
