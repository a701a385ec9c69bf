"""Lowered cells against torch, in onnxruntime.

B batch, T time, D width, L layers times directions, E units
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.targets.build import tensors
from tests.targets.contract import stateful_modules
from thesean.deploy.lowering import forms
from thesean.deploy.lowering.lower import lower_cells
from thesean.deploy.lowering.lowered import form_of, operations
from thesean.deploy.lowering.to_onnx import quick_exporter, to_onnx
from thesean.errors import ExportError
from thesean.passes.graph.lean_trace import lean_trace
from thesean.passes.graph.signature import InputSpec
from thesean.targets import PartFacts, Target, TargetModule, build_module
from thesean.targets.shared.core import Core

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

# torch 2.13's exporter deep-copies a tree spec in a way that torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SIZES = [(2, 7), (2, 19), (5, 3), (1, 1), (1, 300)]
D = Dim.DYNAMIC


def export(module: nn.Module, args: tuple[torch.Tensor, ...], shapes: Any, opset: int = 18) -> Any:
    lowered = lower_cells(module, opset=opset)
    settings: dict[str, Any] = dict(dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False)
    with quick_exporter(), lean_trace(2):
        program = torch.onnx.export(lowered, args, **settings)
    assert program is not None
    found = next(o.version for o in program.model_proto.opset_import if o.domain == "")
    assert found == opset
    return program.model_proto


_sessions: dict[int, tuple[Any, Any]] = {}


def run(proto: Any, args: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """On a session that is made in a model's first run: nobody may change it afterwards."""
    if id(proto) not in _sessions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        _sessions[id(proto)] = proto, session  # the model as well, or its id would be reused
    _, session = _sessions[id(proto)]
    return session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)})


def assert_same(proto: Any, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        expected = module(*args)
    for found, want in zip(run(proto, args), expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-5)


def target(name: str, mixing: Any = "causal", scope: Any = "mixing") -> Any:
    torch.manual_seed(0)
    part = PartFacts(
        path="layers.0",
        input_shape=("batch", "time", 16),
        output_shape=("batch", "time", 16),
        mixing=mixing,
        params=1,
    )
    return build_module(Target(name, scope=scope), part).eval()


OPERATORS = {
    "elman": ["RNN"],
    "gru": ["GRU"],
    "lstm": ["LSTM"],
    "mingru": ["Scan"],
    "linear-attention": ["LinearAttention"],
    "delta": ["LinearAttention"],
    "ssm": ["CausalConvWithState", "LinearAttention"],
    "reservoir": ["Scan"],
}


class Flat(nn.Module):
    """A causal target with its states as arguments and outputs of their own, as a file has them."""

    def __init__(self, module: TargetModule) -> None:
        super().__init__()
        self.module = module
        self.count = len(tensors(module.initial_state(torch.zeros(1, 1, 16))))

    def forward(self, x_BTD: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y_BTD, state = self.module(x_BTD, states if self.count > 1 else states[0])
        return y_BTD, *tensors(state)


def with_state(flat: Flat, batch: int, time: int, size: float = 0.1) -> tuple[torch.Tensor, ...]:
    x_BTD = torch.randn(batch, time, 16)
    return x_BTD, *(size * torch.randn_like(z).abs() for z in tensors(flat.module.initial_state(x_BTD)))


# a cell, and a core that becomes operators of onnxruntime's own, while one works
EVERY = [n if n in ("gru", "ssm") else pytest.param(n, marks=pytest.mark.thorough) for n in stateful_modules()]


@pytest.fixture(scope="module", params=EVERY)
def exported(request: pytest.FixtureRequest) -> tuple[Flat, Any]:
    flat = Flat(target(request.param, scope="part")).eval()
    proto = export(flat, with_state(flat, 2, 7), ({0: D, 1: D}, ({0: D},) * flat.count))
    found = Counter(node.op_type for node in proto.graph.node)
    expected = OPERATORS.get(request.param, [])  # others are torch code to the exporter
    assert [found[name] for name in expected] == [1] * len(expected)
    return flat, proto


@pytest.mark.parametrize(("batch", "time"), SIZES)
def test_a_causal_target_with_its_state_equals_torch_at_every_size(exported, batch, time):
    module, proto = exported
    assert_same(proto, module, with_state(module, batch, time))


def test_one_file_serves_prefill_and_single_steps(exported):
    flat, proto = exported
    x_BTD, *zeros = with_state(flat, 2, 9, size=0.0)
    full, *full_states = run(proto, (x_BTD, *zeros))
    first, *states = run(proto, (x_BTD[:, :7], *zeros))
    outputs = [first]
    for t in (7, 8):
        y, *states = run(proto, (x_BTD[:, t : t + 1], *map(torch.from_numpy, states)))
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, 1), full, rtol=1e-5, atol=1e-6)
    for state, full_state in zip(states, full_states, strict=True):
        np.testing.assert_allclose(state, full_state, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(stateful_modules()) - {"elman", "lstm"}))  # gru's form is theirs
def test_a_bidirectional_target_equals_torch_at_every_size(name):
    module = target(name, mixing="bidirectional")
    proto = export(module, (torch.randn(2, 7, 16),), ({0: D, 1: D},))
    for batch, time in SIZES:
        assert_same(proto, module, (torch.randn(batch, time, 16),))


class Cells(nn.Module):
    """A guide's own cell, with outputs flattened to a tuple of tensors."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hx = (state if len(state) > 1 else state[0]) if state else None
        y, last = self.cell(x, hx)
        return (y, *last) if isinstance(last, tuple) else (y, last)


@pytest.mark.parametrize(
    ("cell", "opset"),
    [
        pytest.param(nn.RNN(8, 6, nonlinearity="relu", batch_first=True), 18, marks=pytest.mark.thorough),
        pytest.param(nn.GRU(8, 6, num_layers=2, bidirectional=True, bias=False), 18, marks=pytest.mark.thorough),
        (nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), 22),
    ],
    ids=["relu", "gru without bias, time first", "lstm"],
)
def test_a_guides_own_cell_with_layers_directions_and_state_equals_torch(cell, opset):
    module = Cells(cell).eval()
    rows = cell.num_layers * (2 if cell.bidirectional else 1)

    def args(batch: int, time: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch, time, 8) if cell.batch_first else torch.randn(time, batch, 8)
        return (x, *(torch.randn(rows, batch, 6) for _ in range(2 if cell.mode == "LSTM" else 1)))

    states = len(args(1, 1)) - 1
    shapes = ({0: D, 1: D}, tuple({1: D} for _ in range(states)))  # *state is one argument, a tuple
    proto = export(module, args(2, 7), shapes, opset)
    for batch, time in SIZES:
        assert_same(proto, module, args(batch, time))


@pytest.mark.thorough
def test_a_cell_without_a_state_starts_from_zeros():
    module = nn.Sequential(nn.Linear(8, 8), Cells(nn.LSTM(8, 6, batch_first=True))).eval()
    proto = export(module, (torch.randn(2, 7, 8),), ({0: D, 1: D},))
    assert_same(proto, module, (torch.randn(3, 11, 8),))


@pytest.mark.thorough
def test_cells_inside_a_graph_module_are_lowered():
    root: Any = nn.ModuleDict({"a": target("mingru"), "b": target("linear-attention")})
    graph = torch.fx.Graph()
    x, state_a, state_b = (graph.placeholder(n) for n in ("x", "state_a", "state_b"))
    a = graph.call_module("a", (x, state_a))
    b = graph.call_module("b", (graph.call_function(lambda pair, i: pair[i], (a, 0)), state_b))
    pick = [graph.call_function(lambda pair, i: pair[i], pair) for pair in ((b, 0), (a, 1), (b, 1))]
    graph.output(tuple(pick))
    module = torch.fx.GraphModule(root, graph).eval()

    def args(batch: int, time: int) -> tuple[torch.Tensor, ...]:
        x_BTD = torch.randn(batch, time, 16)
        return x_BTD, root["a"].initial_state(x_BTD) + 0.1, root["b"].initial_state(x_BTD) + 0.1

    proto = export(module, args(2, 7), ({0: D, 1: D}, {0: D}, {0: D}))
    for batch, time in SIZES:
        assert_same(proto, module, args(batch, time))


def test_the_original_is_left_as_it_was():
    module = target("gru")
    before = copy.deepcopy(module)
    lower_cells(module)
    assert isinstance(module.core, nn.GRU)
    assert all(p.requires_grad for p in module.parameters())
    x_BTD = torch.randn(2, 5, 16)
    torch.testing.assert_close(module(x_BTD), before(x_BTD), rtol=0, atol=0)


def test_one_cell_used_twice_stays_one_cell():
    cell = nn.GRU(4, 4)
    lowered: Any = lower_cells(nn.ModuleList([cell, cell, nn.GRU(4, 4)]))
    assert lowered[0] is lowered[1]
    assert lowered[0] is not lowered[2]
    assert not any(isinstance(module, nn.GRU) for module in lowered)


def test_a_cell_itself_can_be_lowered():
    assert not isinstance(lower_cells(nn.GRU(4, 4)), nn.GRU)


def test_a_core_is_lowered_by_the_file_of_its_operations_name():
    """Each kernel that a target or a cache calls has a form, and what is made of several."""
    used = {name for family in stateful_modules() for name in operations(target(family))} | {
        "window",
        "window_attention",
        "cached_attention",
        "kept_attention",
        "held",
        "running_fold",
    }
    files = {path.stem for path in Path(str(forms.__file__)).parent.glob("*.py")} - {"__init__"}
    assert used == files
    for name in files:
        form = form_of(name)
        assert form is not None
        assert callable(form.lower)
    assert form_of("no_such_operation") is None


def double(x_BTD: torch.Tensor) -> torch.Tensor:
    return 2 * x_BTD


def stepwise(x_BTD: torch.Tensor) -> torch.Tensor:
    return torch.stack([2 * x_BD for x_BD in x_BTD.unbind(1)], 1)


def exported_core(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> Any:
    """A core whose kernel nobody wrote a form for, and its file."""
    monkeypatch.setitem(sys.modules, "thesean.kernels.double", SimpleNamespace(double=kernel))
    graph = torch.fx.Graph()
    graph.output((graph.call_module("core", (graph.placeholder("x"),)),))
    module = torch.fx.GraphModule({"core": Core("double")}, graph).eval()
    spec = InputSpec(name="x", dtype=torch.float32, shape=("batch", "time", 4))
    return module, ir.to_proto(to_onnx(module, {"x": torch.randn(2, 7, 4)}, (spec,), ("y",), 18))


def test_a_core_without_a_form_goes_through_the_exporter_as_torch_code(monkeypatch):
    module, proto = exported_core(monkeypatch, double)
    assert_same(proto, module, (torch.randn(3, 11, 4),))


def test_where_the_exporter_fails_the_file_to_add_is_named(monkeypatch):
    expected = (
        r"can't write this graph .* form is known of 'double': add thesean/deploy/lowering/forms/double\.py, which"
    )
    with pytest.raises(ExportError, match=expected):
        exported_core(monkeypatch, stepwise)


def test_cores_have_nothing_to_save():
    """So that a conversion that was saved before they were one class loads."""
    cores = [m for name in stateful_modules() for m in target(name).modules() if isinstance(m, Core)]
    assert len(cores) >= 5
    assert not [core for core in cores if core.state_dict()]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_lowered_module_refuses_to_run_outside_an_export(name):
    with pytest.raises(ExportError, match=r"(core|convolution): a lowered cell ran outside an export"):
        lower_cells(target(name))(torch.randn(2, 3, 16))


def test_an_lstm_with_projections_is_refused_by_its_path():
    module = nn.ModuleDict({"encoder": nn.LSTM(4, 4, proj_size=2)})
    with pytest.raises(ExportError, match=r"^encoder: expected an LSTM without projections, found proj_size=2"):
        lower_cells(module)
