"""What is told of a file that was written, and which words say how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from thesean.deploy.export_report import ExportReport, check_runtime, check_words, parse_dtype, parse_stateful
from thesean.deploy.parity import Check
from thesean.errors import ExportError

REPORT = ExportReport(
    path=Path("m.onnx"),
    bytes=1_234_567,
    opset=20,
    stateful=False,
    inputs=("x", "mask"),
    outputs=("y", "z"),
    checks=(Check("onnxruntime vs torch", (2, 7), 1e-6), Check("onnxruntime vs torch", (1, 1), 2e-6)),
    tolerance=1e-4,
    seconds=3.21,
)


def test_a_report_is_three_lines_where_there_is_no_more_to_say():
    assert str(REPORT).splitlines() == [
        "wrote m.onnx: 1.23 MB, opset 20, without state, 3.2 s",
        "  inputs x, mask; outputs y, z",
        "  2 checks in onnxruntime; largest error 2.0e-06 (onnxruntime vs torch at (1, 1)), tolerance 1e-04",
    ]


def test_what_else_there_is_has_a_line_of_its_own_and_an_encoder_all_of_its():
    encoder = replace(REPORT, path=Path("m.encoder.onnx"))
    told = replace(
        REPORT, stateful=True, dtype="float16", delay=3, weights=Path("a") / "m.weights", note="mind this",
        encoder=encoder,
    )  # fmt: skip
    lines = str(told).splitlines()
    assert lines[:5] == [
        "wrote m.onnx: 1.23 MB, opset 20, float16, with state, 3.2 s",
        "  the weights are in m.weights, beside it: move both together",
        "  inputs x, mask; outputs y, z",
        "  outputs come 3 steps late: 3 more, not seen, bring the last ones",
        "  2 checks in onnxruntime; largest error 2.0e-06 (onnxruntime vs torch at (1, 1)), tolerance 1e-04",
    ]
    assert lines[5] == "  mind this"
    assert "\n".join(lines[6:]) == f"its encoder: {encoder}"


@pytest.mark.parametrize(
    ("states", "told"), [(3, "state_{}_0, state_{}_1, state_{}_2"), (4, "state_{}_0 to state_{}_3")]
)
def test_of_many_states_the_first_and_the_last_are_told(states: int, told: str):
    inputs, outputs = (tuple(f"state_{way}_{k}" for k in range(states)) for way in ("in", "out"))
    lines = str(replace(REPORT, inputs=("x", *inputs), outputs=("y", *outputs))).splitlines()
    assert lines[1] == f"  inputs x, {told.replace('{}', 'in')}; outputs y, {told.replace('{}', 'out')}"


def test_a_graph_of_torchs_has_no_opset_and_was_compared_there():
    lines = str(replace(REPORT, opset=0)).splitlines()
    assert lines[0] == "wrote m.onnx: 1.23 MB, a graph of torch's, without state, 3.2 s"
    assert lines[2].startswith("  2 checks in torch; ")


@pytest.mark.parametrize(
    ("word", "meant"), [("auto", None), ("yes", True), ("no", False), (True, True), (False, False)]
)
def test_a_state_is_asked_for_by_a_word_or_a_truth_value(word, meant):
    assert parse_stateful(word) is meant


@pytest.mark.parametrize("word", ["maybe", None, 2, []])
def test_other_words_for_a_state_are_refused(word: Any):
    with pytest.raises(ExportError, match=r"^stateful: expected "):
        parse_stateful(word)


@pytest.mark.parametrize(
    ("runtime", "name", "more"),
    [
        ("onnxruntime", "m.onnx", {}),
        ("onnxruntime", "m.pt2", {}),
        ("onnxruntime", "m", {"quantize": "int8", "operators": "products"}),
        ("genai", "served", {}),
        ("portable", "m.onnx", {"quantize": None}),
    ],
)
def test_a_runtime_is_what_was_asked_for(runtime, name, more):
    assert check_runtime(runtime, None, Path(name), more) == runtime
    if runtime == "genai":
        assert check_runtime(runtime, "folder", Path(name), more) == runtime


@pytest.mark.parametrize(
    ("runtime", "tokenizer", "name", "more", "told"),
    [
        ("trt", None, "m.onnx", {}, "runtime: expected one of onnxruntime, genai, portable, found 'trt'"),
        ("portable", "folder", "m.onnx", {}, "tokenizer: only a folder"),
        ("portable", None, "m.onnx", {"quantize": "int8"}, "quantize: its operators are onnxruntime's own"),
        (
            "portable",
            None,
            "m.onnx",
            {"operators": "fused"},
            "operators='fused': runtime='portable' has products alone",
        ),
        ("portable", None, "m.pt2", {}, "m.pt2: runtime='portable' is for ONNX"),
        ("genai", None, "m.pt2", {}, "m.pt2: runtime='genai' is for ONNX"),
        ("genai", None, "m.onnx", {}, "m.onnx: runtime='genai' makes a folder"),
        ("onnxruntime", None, "m.gguf", {}, "m.gguf: expected a name that ends in .onnx or .pt2, found .gguf"),
        ("onnxruntime", None, "m.PT2", {}, "m.PT2: expected a name that ends in .onnx or .pt2, found .PT2"),
    ],
)
def test_what_does_not_go_together_is_refused(runtime, tokenizer, name, more, told):
    with pytest.raises(ExportError, match=f"^{told}"):
        check_runtime(runtime, tokenizer, Path(name), more)


@pytest.mark.parametrize(
    "form", [{}, {"check": "all"}, {"check": "skip", "external_data": None}, {"external_data": True}]
)
def test_words_that_mean_something_are_taken(form: Any):
    check_words(form)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"check": "none"}, "check: expected one of all, skip, found 'none'"),
        ({"check": None}, "check: expected one of all, skip, found None"),
        ({"external_data": "beside"}, "external_data: expected True, False or None, found 'beside'"),
    ],
)
def test_words_that_mean_nothing_are_refused(form: Any, told: str):
    with pytest.raises(ExportError, match=f"^{told}"):
        check_words(form)


def test_a_precision_is_one_of_torchs_or_its_name():
    assert parse_dtype(None) is None
    assert parse_dtype("float16") is parse_dtype(torch.float16) is torch.float16
    assert parse_dtype("float32") is torch.float32
    for wrong in ("float64", torch.bfloat16, "nn", "half a one", 16):
        with pytest.raises(ExportError, match=r"^dtype: expected torch\.float32 or torch\.float16, found "):
            parse_dtype(wrong)  # type: ignore[arg-type]
