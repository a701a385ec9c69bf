"""Steps that torch and ONNX scan, walked one by one, against the kernels and cells that they stand for.

A scan's body is taken apart by torch, not run; here a loop runs it.

B batch, T time, H heads, F features of a key, K width of a value
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from tests.deploy.lowering.test_lower import target
from thesean.deploy.lowering import in_torch
from thesean.deploy.lowering.forms import leaky_recurrence, linear_recurrence, torch_cell
from thesean.deploy.lowering.lower import cells_in_torch
from thesean.deploy.lowering.lowered import Lowered, form_of
from thesean.errors import ExportError
from thesean.targets.shared.core import Core

B, T, H, F, K = 3, 11, 2, 4, 5
SIZES = [(1, 1), (1, 4), (B, T)]


def walked(step: Callable[..., tuple[Any, Any]], state: Any, inputs: Any) -> tuple[Any, Any]:
    """What torch's scan says it does."""
    first, outs = next(iter(inputs)) if isinstance(inputs, tuple) else inputs, []
    for t in range(len(first)):
        state, out = step(state, tree_map(lambda x, t=t: x[t], inputs))
        outs.append(out)
    return state, torch.stack(outs)


@pytest.fixture(autouse=True)
def walks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (in_torch, leaky_recurrence, linear_recurrence):
        monkeypatch.setattr(module, "scan", walked)


def rows(batch: int, time: int, *sizes: int) -> torch.Tensor:
    return torch.randn(batch, time, *sizes)


def heads(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys of length 1 and values."""
    key_BTHF = nn.functional.normalize(rows(batch, time, H, F), dim=-1)
    return rows(batch, time, H, F), key_BTHF, rows(batch, time, H, K)


ARGUMENTS: dict[str, Callable[[int, int], tuple[torch.Tensor, ...]]] = {
    "delta_rule": lambda b, t: (
        *heads(b, t),
        torch.rand(b, t, H),
        -torch.rand(b, t, H),
        torch.randn(b, H, F, K),
    ),
    "delta_rule, a decay a feature": lambda b, t: (
        *heads(b, t),
        torch.rand(b, t, H),
        -torch.rand(b, t, H, F),
        torch.randn(b, H, F, K),
    ),
    "diagonal_scan": lambda b, t: (*heads(b, t), -torch.rand(b, t, H, F), torch.randn(b, H, F, K)),
    "leaky_recurrence": lambda b, t: (rows(b, t, 6), torch.randn(2, 3, 3), torch.rand(6), torch.randn(b, 6)),
    "linear_recurrence": lambda b, t: (torch.rand(b, t, 6), rows(b, t, 6), torch.randn(b, 6)),
}


def stand_ins(operation: str) -> list[Callable[..., Any]]:
    """What a form makes of a core where its ONNX operator is not asked for."""
    form: Any = form_of(operation)
    made = [form.in_torch(Core(operation), "core")]
    if hasattr(form, "portable"):
        made.append(form.portable(Core(operation), "core", 18))
    return [m.emit if isinstance(m, Lowered) else m for m in made]


@pytest.mark.parametrize("case", ARGUMENTS)
def test_what_stands_in_for_a_core_is_its_kernel_at_every_length_and_carries_its_state(case):
    torch.manual_seed(0)
    operation, *_ = case.split(",")
    core = Core(operation)
    for size in SIZES:
        given = ARGUMENTS[case](*size)
        for form in stand_ins(operation):
            for found, wanted in zip(form(*given), core(*given), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", ["delta_rule", "linear_attention", "kept_attention", "window_attention"])
def test_a_core_in_blocks_becomes_one_block_as_long_as_the_chunk(operation):
    form: Any = form_of(operation)
    made, seen = form.in_torch(Core(operation), "core"), dict[str, Any]()
    names = inspect.signature(made.core.kernel).parameters
    made.core.kernel = lambda *tensors, **settings: seen.update(settings)
    made(*[torch.zeros(2, 7, 1)] * 2)
    assert list(seen.values()) == [7]
    assert seen.keys() <= names.keys()


CELLS = {
    "lstm": lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True, proj_size=3),
    "lstm without projection": lambda: nn.LSTM(4, 6, bidirectional=True, bias=False),
    "gru": lambda: nn.GRU(4, 6, num_layers=2, batch_first=True, bidirectional=True),
    "gru, time first": lambda: nn.GRU(4, 6),
    "tanh": lambda: nn.RNN(4, 6, batch_first=True, bias=False),
    "relu": lambda: nn.RNN(4, 6, num_layers=2, nonlinearity="relu", batch_first=True),
}


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return CELLS[request.param]().requires_grad_(False)


def assert_same(found: Any, wanted: Any) -> None:
    (y, last), (known, known_last) = found, wanted
    torch.testing.assert_close(y, known, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tuple(last), tuple(known_last), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_a_cell_in_torch_code_is_torchs_own_from_zeros_and_from_a_state(cell):
    made = torch_cell.in_torch(cell, "cell")
    for batch, time in SIZES:
        x = rows(batch, time, 4) if cell.batch_first else rows(time, batch, 4)
        wanted = cell(x)
        assert_same(made(x), wanted)
        states = tree_map(torch.randn_like, wanted[1])
        assert_same(made(x, states), cell(x, states))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_a_cell_that_is_told_lengths_keeps_a_rows_last_state_and_gives_zeros_behind_it(cell):
    made, lengths_B = torch_cell.in_torch(cell, "cell"), torch.tensor([4, T, 7])
    x = rows(B, T, 4) if cell.batch_first else rows(T, B, 4)
    packed = pack_padded_sequence(x, lengths_B, batch_first=cell.batch_first, enforce_sorted=False)
    y, last = cell(packed)
    known, _ = pad_packed_sequence(y, batch_first=cell.batch_first)
    assert_same(made(x, None, lengths_B), (known, last))


def test_a_cell_without_a_batch_is_refused_by_its_path():
    with pytest.raises(ExportError, match=r"^encoder: expected a batch of sequences \(3 dimensions\), found 2\."):
        torch_cell.in_torch(nn.GRU(4, 6), "encoder")(torch.zeros(5, 4))


def test_a_target_whose_cells_are_torch_code_gives_what_it_gave():
    module, x_BTD = target("gru").requires_grad_(False), rows(2, 5, 16)
    torch.testing.assert_close(cells_in_torch(module)(x_BTD), module(x_BTD), rtol=1e-5, atol=1e-6)
