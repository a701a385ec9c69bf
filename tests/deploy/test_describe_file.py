"""What is told of an ONNX file, of our making or not.

B batch, T time
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from thesean.deploy.describe_file import describe_file, encoder_of
from thesean.deploy.export import _about
from thesean.deploy.onnx_file import (
    BESIDE_DECODER,
    BESIDE_ENCODER,
    DELAY,
    GUIDE,
    PARITY_SEEN,
    SIZES,
    STATES,
    UNCHECKED,
    UNTRIED,
    WEIGHTS,
    declared,
)
from thesean.deploy.quantizing.quantized import QUANTIZED, Quantized
from thesean.errors import ExportError
from thesean.passes.graph.signature import Bound, InputSpec, Origin

PLAIN = """
<ir_version: 10, opset_import: ["com.microsoft" : 1, "" : 18]>
agraph (float[batch, 4] x, bool[batch] seen, float16[batch, past, 2] state_in_h)
    => (float[batch, 4] y, float16[batch, total, 2] state_out_h)
{
    a = Add (x, x)
    b = Add (a, a)
    c = com.microsoft.Gelu (b)
    y = Identity (c)
    state_out_h = Identity (state_in_h)
}
"""
STATE = {"name": "state_in_h", "dtype": "float16", "shape": ["batch", "past", 2], "start": "nothing"}


def written(path: Path, told: dict[str, Any], text: str = PLAIN, maker: tuple[str, str] = ("", "")) -> Path:
    model = onnx.parser.parse_model(text)
    model.producer_name, model.producer_version = maker
    for value in model.graph.input:
        value.doc_string = f"what {value.name} is"
    onnx.helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()})
    onnx.save(model, path)
    return path


def test_a_file_of_another_maker_is_shown_too(tmp_path):
    path = written(tmp_path / "m.onnx", {})
    shown, told = describe_file(path)
    assert told == {}
    assert (
        shown
        == f"""\
{path}: 0.00 MB, opset 18, 5 nodes, made by an unknown maker

inputs
  x           float    (batch, 4)        what x is
  seen        bool     (batch)           what seen is
  state_in_h  float16  (batch, past, 2)  what state_in_h is

outputs
  y            float    (batch, 4)
  state_out_h  float16  (batch, total, 2)

operators
  2 Add, 2 Identity, 1 com.microsoft.Gelu"""
    )


def test_all_that_a_file_says_of_itself_is_shown(tmp_path):
    cost: dict[str, Any] = dict(
        form="int8", products=3, share=0.5, calibrated=0, samples="2 batches", divergence=0.01, unit="nats",
        agreement=None, apart=None, exact_bytes=2_000_000, whole_ms=(4.0, 2.0), step_ms=None,
    )  # fmt: skip
    checks = [
        {"label": "onnxruntime vs torch", "shape": [2, 7], "max_abs_error": 1e-6},
        {"label": "onnxruntime vs torch", "shape": [1, 1], "max_abs_error": 3e-6},
    ]
    told = {
        STATES: [STATE],
        DELAY: {"steps": 3, "seen": "seen"},
        SIZES: [Bound(name="batch").to_json(), Bound(name="past", least=0, most=16).to_json()],
        GUIDE: Origin(weights="abc", commit="def").to_json(),
        PARITY_SEEN: checks,
        UNCHECKED: "torch gives inf",
        UNTRIED: [4096],
        QUANTIZED: Quantized(**cost).to_json(),
    }
    shown = describe_file(written(tmp_path / "m.onnx", told, maker=("maker", "1.0")))[0].split("\n\n")
    assert shown[0].endswith("made by maker 1.0")
    assert "  state_in_h  float16  (batch, past, 2)  state, starts as nothing" in shown[1]
    assert shown[3:6] == [
        "delay\n  outputs come 3 steps late; after the last token 3 more, seen False",
        "sizes\n  batch: 1 or more, no others\n  past: 0 to 16, no others",
        "guide\n  weights abc\n  commit def",
    ]
    assert shown[7].splitlines()[:3] == [
        "parity",
        "  2 checks in onnxruntime; largest error 3.0e-06 (onnxruntime vs torch at (1, 1))",
        "  not checked: torch gives inf",
    ]
    assert shown[7].splitlines()[3].startswith("  with state not tried past step 4096,")
    assert shown[8] == f"quantised\n{Quantized(**cost)}"


def test_of_many_operators_the_most_frequent_are_named_and_others_counted(tmp_path):
    kinds = ["Abs", "Neg", "Exp", "Log", "Sqrt", "Sin", "Cos", "Tan", "Tanh", "Erf", "Ceil", "Floor", "Round", "Sign"]
    names = [kind for k, kind in enumerate(kinds) for _ in range(2 if k else 1)]
    nodes = "\n".join(f"    v{k + 1} = {kind} (v{k})" for k, kind in enumerate(names))
    text = (
        f'<ir_version: 10, opset_import: ["" : 18]>\nagraph (float[2] v0) => (float[2] v{len(names)})\n{{\n{nodes}\n}}'
    )
    shown, _ = describe_file(written(tmp_path / "m.onnx", {}, text))
    named = shown.split("operators\n  ")[1].split(", ")
    assert named[:12] == [f"2 {kind}" for kind in kinds[1:13]]
    assert named[12:] == ["3 others"]


def test_files_beside_it_are_named_and_said_to_be_missing(tmp_path):
    beside = {"file": "m.encoder.onnx", "sha256": "0", "gives": ["encoded_0", "encoded_1"]}
    told = {BESIDE_ENCODER: beside, BESIDE_DECODER: {"file": "n.onnx"}, WEIGHTS: "m.onnx.01234567.weights"}
    path = written(tmp_path / "m.onnx", told)
    shown, read = describe_file(path)
    assert "MB and missing of weights in m.onnx.01234567.weights, opset" in shown
    assert "encoder\n  m.encoder.onnx, which is missing; it gives encoded_0, encoded_1, the same in every" in shown
    assert "decoder\n  n.onnx" in shown
    assert encoder_of(path, read) is None
    assert encoder_of(path, {}) is None
    (tmp_path / "m.encoder.onnx").touch()
    (tmp_path / "m.onnx.01234567.weights").write_bytes(b"0" * 1_230_000)
    shown, read = describe_file(path)
    assert "MB and 1.23 MB of weights in" in shown
    assert "m.encoder.onnx; it gives" in shown
    assert encoder_of(path, read) == tmp_path / "m.encoder.onnx"


def test_a_guide_of_which_the_weights_alone_are_known(tmp_path):
    shown, _ = describe_file(written(tmp_path / "m.onnx", {GUIDE: Origin(weights="abc").to_json()}))
    assert "guide\n  weights abc\n\n" in shown


def test_metadata_that_were_altered_are_told(tmp_path):
    with pytest.raises(
        ExportError, match=r"^the file's metadata were altered: thesean\.states can't be read\. Export it again\.$"
    ):
        describe_file(written(tmp_path / "m.onnx", {STATES: "nothing"}))


def test_weights_that_are_inputs_too_are_no_inputs(tmp_path):
    text = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[2] x, float[2] w = {1.0, 2.0}) => (float[2] y)
{
    y = Add (x, w)
}
"""
    shown, _ = describe_file(written(tmp_path / "m.onnx", {}, text))
    assert "  x  float  (2)  what x is\n\noutputs" in shown


def test_inputs_states_and_other_outputs_are_declared(tmp_path):
    inputs, states, outputs = declared(written(tmp_path / "m.onnx", {STATES: [STATE]}))
    assert inputs == (("x", "float32", ("batch", 4)), ("seen", "bool_", ("batch",)))
    assert states == (("state_in_h", "float16", ("batch", "past", 2)),)
    assert outputs == ("y",)
    inputs, states, outputs = declared(written(tmp_path / "m.onnx", {}))
    assert [name for name, *_ in inputs] == ["x", "seen", "state_in_h"]
    assert (states, outputs) == ((), ("y", "state_out_h"))


def test_a_file_tells_of_states_where_it_has_any():
    grows = InputSpec(name="state_in_key", dtype=torch.float16, shape=("batch", 2, "past", 4))
    sums = InputSpec(name="state_in_sum", dtype=torch.float32, shape=("batch", 4))
    assert _about((), {"guide": "mine"}) == {"guide": "mine"}
    told = _about((grows, sums), {"guide": "mine"})
    assert told["guide"] == "mine"
    assert json.loads(told[STATES]) == [
        {"name": "state_in_key", "dtype": "float16", "shape": ["batch", 2, "past", 4], "start": "nothing"},
        {"name": "state_in_sum", "dtype": "float32", "shape": ["batch", 4], "start": "zeros"},
    ]
