"""The look before operators that torch runs without one: what torch's own modules give passes, what is short does not.

B batch, T time, D width in, E width
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from thesean.errors import ArtifactError
from thesean.passes.graph.unchecked import check

aten = torch.ops.aten

CELLS: dict[Any, Any] = {
    aten.lstm.input: nn.LSTM,
    aten.gru.input: nn.GRU,
    aten.rnn_tanh.input: nn.RNN,
    aten.rnn_relu.input: nn.RNN,
}


def given(target: Any, layers: int, bias: bool, both: bool, first: bool) -> list[Any]:
    """What a module of 8 to 16 hands on for 3 rows of 5 steps."""
    module = CELLS[target](8, 16, layers, bias=bias, bidirectional=both, batch_first=first)
    state = torch.zeros(layers * (2 if both else 1), 3, 16)
    x = torch.zeros(3, 5, 8) if first else torch.zeros(5, 3, 8)
    states: Any = [state, state] if target is aten.lstm.input else state
    return [x, states, list(module._flat_weights), bias, layers, 0.0, False, both, first]


@pytest.mark.parametrize("target", CELLS, ids=str)
def test_a_cells_own_weights_and_states_fit(target):
    for how in itertools.product((1, 2), (True, False), (True, False), (True, False)):
        args = given(target, *how)
        check(target, args, {})
        target(*args)  # and torch agrees


def test_an_lstms_output_may_be_projected_and_its_states_are_of_two_widths():
    for layers, bias, both, first in itertools.product((1, 2), (True, False), (True, False), (True, False)):
        module = nn.LSTM(8, 16, layers, bias=bias, bidirectional=both, batch_first=first, proj_size=4)
        states = [torch.zeros(layers * (2 if both else 1), 3, width) for width in (4, 16)]
        x = torch.zeros(3, 5, 8) if first else torch.zeros(5, 3, 8)
        args = [x, states, list(module._flat_weights), bias, layers, 0.0, False, both, first]
        check(aten.lstm.input, args, {})
        aten.lstm.input(*args)  # and torch agrees
        for wrong in ([states[1], states[0]], [states[0], states[0]]):
            with pytest.raises(ArtifactError):
                check(aten.lstm.input, [x, wrong, *args[2:]], {})


@pytest.mark.parametrize("target", CELLS, ids=str)
def test_weights_and_states_of_other_sizes_do_not(target):
    args = given(target, 2, True, True, False)

    def states(change: Any) -> Any:
        return [change(s) for s in args[1]] if isinstance(args[1], list) else change(args[1])

    weights = args[2]
    misfits: dict[int, list[Any]] = {
        0: [torch.zeros(5, 4, 8), torch.zeros(5, 3, 9), torch.zeros(5, 8), torch.zeros(5, 3, 8, dtype=torch.float64)],
        1: [states(lambda s: s[:3]), states(lambda s: s[..., :15]), states(lambda s: s[:, :2]), states(lambda s: s[0]),
            states(torch.Tensor.double)],
        2: [weights[:-1], [*weights, weights[0]], [*weights[1:], weights[0]], [w.double() for w in weights]],
        3: [False],
        4: [0, 1, 3],
        7: [False],
        8: [True],
    }  # fmt: skip
    for at, values in misfits.items():
        for value in values:
            with pytest.raises(ArtifactError, match="don't fit each other"):
                check(target, [*args[:at], value, *args[at + 1 :]], {})


def test_no_state_at_all_is_refused():
    args = given(aten.lstm.input, 1, True, False, False)
    with pytest.raises(ArtifactError, match="don't fit each other"):
        check(aten.lstm.input, [args[0], [], *args[2:]], {})


def test_attention_reads_as_many_keys_as_values_of_one_dtype():
    target = aten.scaled_dot_product_attention.default
    q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 6)
    check(target, (q, k, v), {})
    check(target, (q.half(), k.half(), v.half(), None, 0.0, True), {"scale": 1.0})
    misfits = [
        (q, k[:, :, :6], v), (q, k, v[:, :3]), (q[..., :7], k, v), (q, k[..., :7], v), (q.half(), k, v),
        (q, k.half(), v), (q, k, v.half()), (q.long(), k.long(), v.long()),
    ]  # fmt: skip
    for args in misfits:
        with pytest.raises(ArtifactError, match="don't fit each other"):
            check(target, args, {})


def test_a_weight_norm_has_one_length_a_slice():
    v = torch.ones(2, 4, 3)
    for g, dim in ((torch.ones(2, 1, 1), 0), (torch.ones(1, 4, 1), 1), (torch.ones(1, 1, 3), 2), (torch.ones(()), -1)):
        check(aten._weight_norm.default, (v, g, dim), {})
    check(aten._weight_norm.default, (v, torch.ones(2, 1, 1)), {})
    for g, dim in ((torch.ones(2, 1, 1), 1), (torch.ones(1, 4, 1), 0), (torch.ones(2), -1), (torch.ones(1), 3),
                   (torch.ones(1), -2)):  # fmt: skip
        with pytest.raises(ArtifactError, match="don't fit each other"):
            check(aten._weight_norm.default, (v, g, dim), {})


def test_whole_numbers_are_truncated_by_numbers_other_than_minus_one():
    whole, real = torch.ones(2, dtype=torch.int64), torch.ones(2)
    for x, by, mode in ((whole, 3, "trunc"), (whole, -1, "floor"), (whole, whole, "floor"), (real, -1, "trunc"),
                        (whole, real, "trunc"), (real, whole, "trunc"), (whole, -1, None)):  # fmt: skip
        check(aten.div.Tensor_mode, (x, by), {"rounding_mode": mode})
    for by in (-1, whole):
        with pytest.raises(ArtifactError, match="don't fit each other"):
            check(aten.div.Tensor_mode, (whole, by), {"rounding_mode": "trunc"})
