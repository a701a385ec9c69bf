"""`thesean inspect`: what a file takes and gives, of ours and of anybody's."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

import thesean
from tests import exported, models
from tests.cli.test_app import error_of, run
from thesean.deploy.onnx_file import GUIDE, metadata
from thesean.deploy.session import Session
from thesean.errors import ExportError


def test_a_file_of_ours_tells_its_inputs_states_and_parity() -> None:
    result = run("inspect", exported.gpt2_gru().path)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "made by thesean-compiler" in lines[0]
    assert "input_ids int64 (batch, time) ids from 0 to 31" in lines
    assert any(line.startswith("logits float (batch, time, ") for line in lines)
    assert sum(line.startswith("state_in_") and line.endswith("state, starts as zeros") for line in lines) == 3
    assert any("checks in onnxruntime; largest error" in line for line in lines)


def test_inputs_and_outputs_say_what_they_are() -> None:
    model = onnx.load(exported.gpt2_gru().path)
    told = {value.name: value.doc_string for value in (*model.graph.input, *model.graph.output)}
    assert told["input_ids"] == "ids from 0 to 31"
    assert told["logits"] == "the guide's output"
    assert told["state_in_0"] == "state; starts as zeros, then state_out_0 of the last call"
    assert told["state_out_2"] == "state; the next call's state_in_2"
    assert "ids from 0 to 31" in run("inspect", exported.gpt2_gru().path).stdout


@pytest.mark.thorough
def test_a_file_tells_of_which_guide_it_is_and_so_does_that_of_a_saved_conversion(tmp_path: Path) -> None:
    guide, batches = models.gpt2(), models.token_batches()
    guide.config._commit_hash = "0123abc"
    assert thesean.export_guide(guide, tmp_path / "guide.onnx", data=batches).stateful
    converted = thesean.compile(guide, "gru", data=batches, recipe="fast", progress=False)
    thesean.load(converted.save(tmp_path / "saved")).export(tmp_path / "m.onnx")
    converted.frontier[1].export(tmp_path / "one.onnx")
    with torch.no_grad():
        next(guide.parameters()).mul_(2)
    thesean.export_guide(guide, tmp_path / "other.onnx", data=batches)
    own, loaded, one, other = (
        json.loads(metadata(tmp_path / f"{n}.onnx")[GUIDE]) for n in ("guide", "m", "one", "other")
    )
    assert own == loaded == one
    assert own["commit"] == other["commit"] == "0123abc"
    assert own["weights"] != other["weights"]
    told = run("inspect", tmp_path / "m.onnx").stdout
    assert f"weights {own['weights']}" in told
    assert "commit 0123abc" in told
    shown = {v.name: v.doc_string for v in onnx.load(tmp_path / "guide.onnx").graph.input}
    assert any("starts as nothing (past of 0)" in text for text in shown.values())


def test_another_makers_model_is_described_too(tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 3]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    result = run("inspect", tmp_path / "m.onnx")
    assert result.exit_code == 0, result.output
    assert "1 nodes, made by an unknown maker" in result.stdout
    assert "1 Relu" in result.stdout
    assert "plan" not in result.stdout


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_what_is_no_model_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    told = error_of(run("inspect", tmp_path / "m.onnx"))
    assert ("is no ONNX model" if content else "can't read") in told


@pytest.mark.parametrize("key", ["delay", "encoder", "decoder", "sizes", "guide", "states", "parity", "quantized"])
def test_metadata_that_were_altered_are_one_line(key: str, tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 3]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    for text in ("{", "5", "null", "[1]", '[{"other": 1}]'):
        model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
        model.metadata_props.add(key=f"thesean.{key}", value=text)
        onnx.save(model, tmp_path / "m.onnx")
        told = error_of(run("inspect", tmp_path / "m.onnx"))
        assert f"the file's metadata were altered: thesean.{key} can't be read" in told
        if key in ("delay", "encoder", "sizes"):  # what a session goes by
            with pytest.raises(ExportError, match=f"altered: thesean.{key} can't be read"):
                Session(tmp_path / "m.onnx")
