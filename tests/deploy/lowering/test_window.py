"""A window of softmax attention, and states that queries share, in onnxruntime.

B batch, T time, D width, W window, H heads, G heads of keys and values
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.export import Dim

from tests import captured, models
from tests.deploy.lowering.test_lower import Flat, assert_same, export, run, target, with_state
from tests.exported import hybrid
from tests.targets.build import tensors
from thesean.deploy.export import export as export_hybrid
from thesean.deploy.lowering.forms.window import define
from thesean.deploy.lowering.forms.window_attention import BIASED, DOMAIN, NAME
from thesean.deploy.lowering.lower import lower_cells
from thesean.deploy.lowering.window_function.shape import runs_of
from thesean.deploy.session import Session
from thesean.errors import ExportError
from thesean.targets import PartFacts, Target, build_module
from thesean.targets.shared.core import Core
from thesean.targets.shared.distance_bias import LearntReach
from thesean.targets.shared.registry import rebuild

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

D = Dim.DYNAMIC
WINDOW = 33


def module(window: int | None, heads: int = 4, kv_heads: int = 2, width: int = 16) -> Any:
    torch.manual_seed(0)
    shape = ("batch", "time", width)
    part = PartFacts(path="layers.0", input_shape=shape, output_shape=shape, mixing="causal", params=1)
    chosen = Target("linear-attention", heads=heads, kv_heads=kv_heads, window=window)
    made: Any = build_module(chosen, part)
    with torch.no_grad():
        made.last.weight.normal_()
        if made.window is not None:
            made.window.gate_H.normal_()
    return made.eval()


def exported(flat: Flat, opset: int = 18) -> Any:
    model = ir.from_proto(export(flat, with_state(flat, 2, 7), ({0: D, 1: D}, ({0: D},) * flat.count), opset))
    define(model)
    return ir.to_proto(model)


def some_state(flat: Flat, batch: int, time: int, width: int = 16) -> tuple[torch.Tensor, ...]:
    """x_BTD and the state after 50 tokens of another sequence."""
    with torch.no_grad():
        x_BTD = torch.randn(batch, time, width)
        return x_BTD, *tensors(flat.module(torch.randn(batch, 50, width))[1])


@pytest.fixture(scope="module")
def windowed() -> tuple[Flat, Any]:
    flat = Flat(module(WINDOW)).eval()
    return flat, exported(flat)


SIZES = [(2, 7), (2, 19), (5, 3), (1, 1), (1, 32), (2, 33), (1, 34), (2, 66), (1, 300)]


@pytest.mark.thorough
@pytest.mark.parametrize(("batch", "time"), SIZES)
def test_the_function_equals_torch_at_every_size_from_the_start_and_within_a_sequence(windowed, batch, time):
    flat, proto = windowed
    assert_same(proto, flat, with_state(flat, batch, time, size=0.0))
    assert_same(proto, flat, some_state(flat, batch, time))


@pytest.mark.thorough
@pytest.mark.parametrize("window", [1, 2, 5])
def test_windows_narrower_than_a_block_equal_torch(window):
    flat = Flat(module(window)).eval()
    proto = exported(flat, opset=20)
    for batch, time in SIZES:
        assert_same(proto, flat, some_state(flat, batch, time))


def test_features_that_fill_no_block_equal_torch():
    flat = Flat(module(2, width=24)).eval()  # 12 of a head of width 6
    given = some_state(flat, 2, 7, width=24)
    model = ir.from_proto(export(flat, given, ({0: D, 1: D}, ({0: D},) * flat.count), 20))
    define(model)
    for time in (1, 7):
        assert_same(ir.to_proto(model), flat, some_state(flat, 3, time, width=24))


def test_values_that_take_several_blocks_equal_torch():
    flat = Flat(module(5, heads=2, kv_heads=1, width=64)).eval()  # of width 32, and the weight beside them
    given = some_state(flat, 2, 9, width=64)
    model = ir.from_proto(export(flat, given, ({0: D, 1: D}, ({0: D},) * flat.count), 20))
    define(model)
    for time in (1, 9, 40):
        assert_same(ir.to_proto(model), flat, some_state(flat, 3, time, width=64))


@pytest.mark.parametrize(
    ("window", "kv_heads"),
    [(5, 4), pytest.param(1, 2, marks=pytest.mark.thorough), pytest.param(WINDOW, 2, marks=pytest.mark.thorough)],
)
def test_a_bias_of_distance_goes_along(window, kv_heads):
    made = module(window, kv_heads=kv_heads)
    made.window.bias = LearntReach(4, 3)
    with torch.no_grad():
        made.window.bias.table_HD.normal_()
        made.window.bias.slope_H.uniform_(-1, 0)
    flat = Flat(made).eval()
    proto = exported(flat, opset=20)
    called = f"Window_H4_G{kv_heads}_C4_K4_W{window}_N4_biased"
    assert [n.op_type for n in proto.graph.node if n.domain == DOMAIN] == [called]
    assert {f.name for f in proto.functions} == {called, BIASED}
    for batch, time in SIZES:
        assert_same(proto, flat, some_state(flat, batch, time))


@pytest.mark.thorough
def test_the_model_carries_the_function_that_it_calls(windowed):
    _, proto = windowed
    called = f"Window_H4_G2_C4_K4_W{WINDOW}_N4"
    assert {(f.domain, f.name) for f in proto.functions} == {(DOMAIN, called), (DOMAIN, NAME)}
    assert [n.op_type for n in proto.graph.node if n.domain == DOMAIN] == [called]


@pytest.mark.thorough
def test_a_model_without_a_window_gets_no_function():
    model = ir.from_proto(export(torch.nn.Linear(4, 4).eval(), (torch.randn(2, 4),), ({0: D},)))
    define(model)
    assert not model.functions


@pytest.mark.thorough
def test_one_file_serves_a_long_prefill_chunks_and_single_steps(windowed):
    flat, proto = windowed
    x_BTD, *zeros = with_state(flat, 2, 400, size=0.0)
    full, *full_states = run(proto, (x_BTD, *zeros))
    states, outputs, at = zeros, [], 0
    for length in (300, 1, 1, 5, 33, 34, 25, 1):  # a prefill, steps, chunks shorter and longer than the window
        y, *after = run(proto, (x_BTD[:, at : at + length], *states))
        states = [torch.from_numpy(s) for s in after]
        outputs.append(y)
        at += length
    assert at == 400
    np.testing.assert_allclose(np.concatenate(outputs, 1), full, rtol=1e-4, atol=1e-5)
    for state, full_state in zip(states, full_states, strict=True):
        np.testing.assert_allclose(state, full_state, rtol=1e-4, atol=1e-5)


def turned(sinks: int, heads: int = 4) -> Any:
    """Rotated queries in groups, features beside each other turned in pairs, and a window that many tokens leave."""
    shape = ("batch", "time", 16)
    part = PartFacts(path="layers.0", input_shape=shape, output_shape=shape, mixing="causal", params=1)
    chosen = Target("linear-attention", heads=heads, kv_heads=heads // 2, window=5, sinks=sinks)
    made: Any = build_module(chosen, part)
    rotation = [[k, k + 1, 0.1 ** (k / 2)] for k in range(0, 16 // heads, 2)]
    made = rebuild("linear-attention", {**made.config(), "rotation": rotation})
    with torch.no_grad():
        made.last.weight.normal_()
        made.window.gate_H.normal_()
        for each in (made.query.bias, made.key.bias, made.value.bias):
            each.normal_()
    return made.eval()


@pytest.mark.parametrize(
    ("sinks", "heads"),
    [(4, 2), *(pytest.param(sinks, 4, marks=pytest.mark.thorough) for sinks in (0, 1, 4))],
)
def test_steps_alone_equal_all_at_once_under_a_rotation_while_the_sinks_fill_and_after(sinks, heads):
    torch.manual_seed(0)
    flat = Flat(turned(sinks, heads)).eval()
    proto = exported(flat, opset=20)
    x_BTD, *zeros = with_state(flat, 2, 20, size=0.0)
    expected = flat(x_BTD, *zeros)
    states, outputs = zeros, []
    for t in range(20):
        y, *after = run(proto, (x_BTD[:, t : t + 1], *states))
        states = [torch.from_numpy(s) for s in after]
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected[0].detach().numpy(), rtol=1e-4, atol=1e-5)
    for state, known in zip(states, expected[1:], strict=True):
        torch.testing.assert_close(state, known, rtol=1e-4, atol=1e-5)
    for batch, time in SIZES:
        assert_same(proto, flat, some_state(flat, batch, time))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("partner", "runs"),
    [([2, 3, 0, 1], ((2, 4), (0, 2))), ([2, 3, 0, 1, 4, 5], ((2, 4), (0, 2), (4, 6))), ([1, 0] * 8, ())],
)
def test_halves_that_change_places_are_cut_and_joined_and_pairs_are_gathered(partner, runs):
    assert runs_of(partner) == runs


def test_rows_of_a_batch_are_steps_apart():
    """One row's sinks are full, another's window is half full, a third has just begun."""
    flat = Flat(turned(4)).eval()
    proto = exported(flat, opset=20)
    lengths, states = (30, 3, 0), []
    for length in lengths:
        x_BTD, *zeros = with_state(flat, 1, max(length, 1), size=0.0)
        states.append(tensors(flat(x_BTD, *zeros)[1:]) if length else zeros)
    joined = tuple(torch.cat(rows).detach() for rows in zip(*states, strict=True))
    x_BTD = torch.randn(3, 1, 16)
    assert_same(proto, flat, (x_BTD, *joined))


@pytest.mark.thorough
def test_a_score_far_below_nothing_still_counts():
    """Rows of the window that hold no token score 0 by themselves: they must not outweigh what is there."""
    made = turned(4)
    with torch.no_grad():
        made.query.bias.fill_(20.0)
        made.key.bias.fill_(-20.0)
    flat = Flat(made).eval()
    proto = exported(flat, opset=20)
    assert_same(proto, flat, with_state(flat, 2, 1, size=0.0))


@pytest.mark.thorough
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_queries_that_share_a_state_equal_torch(kv_heads):
    flat = Flat(module(None, kv_heads=kv_heads)).eval()
    assert flat.module.initial_state(torch.zeros(1, 1, 16)).shape[1] == kv_heads
    proto = exported(flat)
    for batch, time in SIZES:
        assert_same(proto, flat, some_state(flat, batch, time))


def test_a_lowered_window_refuses_to_run_outside_an_export():
    core = lower_cells(torch.nn.ModuleDict({"core": Core("window_attention")}))
    with pytest.raises(ExportError, match="core: a lowered cell ran outside an export"):
        core["core"](*(torch.zeros(1, 1, 1, 1),) * 4, torch.zeros(1))
    with pytest.raises(ExportError, match="core: a lowered cell ran outside an export"):
        lower_cells(target("linear-attention"))(torch.randn(2, 3, 16))


@pytest.mark.thorough
@pytest.mark.parametrize("guide", [captured.gpt2, captured.llama])
def test_a_converted_language_model_with_a_window_deploys_with_its_state(guide, tmp_path):
    module = hybrid(guide(layers=1), Target("linear-attention", window=4))
    report = export_hybrid(module, guide(layers=1).signature, tmp_path / "model.onnx", stateful="yes")
    assert max(check.max_abs_error for check in report.checks) < 1e-5
    session = Session(tmp_path / "model.onnx")
    ids = models.tokens(1, 30).numpy()
    whole, _ = session.run({"input_ids": ids})
    (prefilled, state), pieces = session.run({"input_ids": ids[:, :20]}), []
    for t in range(20, 30):
        logits, state = session.run({"input_ids": ids[:, t : t + 1]}, state)
        pieces.append(logits["logits"])
    np.testing.assert_allclose(np.concatenate([prefilled["logits"], *pieces], 1), whole["logits"], rtol=1e-4, atol=1e-5)
