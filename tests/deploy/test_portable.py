"""Files of ONNX's own operators: for runtimes beside onnxruntime."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import thesean
from tests import captured, exported, models
from tests.deploy.test_export import leftovers
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.errors import ExportError
from thesean.passes.thread_state import STATE_IN, STATE_OUT

llama = partial(captured.llama, layers=1)

TARGETS: dict[str, Any] = {
    "linear": thesean.Target("linear-attention", window=0),
    "window": thesean.Target("linear-attention", window=4, sinks=2),
    "held": "bounded-attention",
    "delta": "delta",
    "ssm": "ssm",
    "gru": "gru",
    "mingru": "mingru",
    "reservoir": "reservoir",
}
FEW = ("delta", "ssm")  # while one works


def foreign(path: Path) -> set[str]:
    """What a runtime would have to know beside ONNX itself, bodies of loops included."""
    model = onnx.load(path)
    found = {o.domain for o in model.opset_import} | {f.name for f in model.functions}
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            found.add(node.domain)
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found - {""}


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.thorough) for n in TARGETS])
def test_every_family_streams_with_operators_of_onnx_alone(name: str, tmp_path: Path) -> None:
    guide = llama()
    module = exported.hybrid(guide, TARGETS[name])
    report = export(module, guide.signature, tmp_path / "m.onnx", train_length=30, runtime="portable")
    assert report.stateful
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert foreign(report.path) == set()


def test_attentions_that_were_kept_and_gelus_are_onnx_s_own_too(tmp_path: Path) -> None:
    guide = captured.gpt2(layers=1)
    usual = export(guide.graph_module, guide.signature, tmp_path / "usual.onnx")
    assert foreign(usual.path) >= {"com.microsoft", "thesean"}
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx", runtime="portable")
    assert report.stateful
    assert foreign(report.path) == set()


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.filterwarnings("default")  # OpenVINO's own
def test_openvino_streams_it_with_the_numbers_of_onnxruntime(tmp_path: Path) -> None:
    import openvino

    guide = llama()
    report = export(exported.hybrid(guide, TARGETS["window"]), guide.signature, tmp_path / "m.onnx", runtime="portable")
    session, core = Session(report.path), openvino.Core()
    compiled = core.compile_model(core.read_model(report.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    state: Any = None
    theirs = dict(session.zero_state(2))
    for chunk_BT in models.tokens(2, 30).split([5, 1, 20, 4], 1):
        wanted, state = session.run({"input_ids": chunk_BT.numpy()}, state)
        made = compiled({"input_ids": chunk_BT.numpy(), **theirs})
        found = {o.get_any_name(): np.array(made[o]) for o in compiled.outputs}
        np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-4, rtol=1e-4)
        theirs = {name: found[name.replace(STATE_IN, STATE_OUT)] for name in theirs}


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [("m.onnx", {"quantize": "int8"}, "its operators are onnxruntime's own"), ("m.pt2", {}, "is for ONNX")],
)
def test_what_is_no_portable_file_is_refused(name: str, asked: Any, told: str, tmp_path: Path) -> None:
    guide = captured.gpt2(layers=1)
    with pytest.raises(ExportError, match=told):
        export(guide.graph_module, guide.signature, tmp_path / name, runtime="portable", **asked)
    assert leftovers(tmp_path) == []
