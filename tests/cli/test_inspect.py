"""`thesean inspect`: what a file takes and gives, of ours and of anybody's."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests import exported
from tests.cli.test_app import error_of, run


def test_a_file_of_ours_tells_its_inputs_states_and_parity() -> None:
    result = run("inspect", exported.gpt2_gru().path)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "made by thesean-compiler" in lines[0]
    assert "input_ids int64 (batch, time)" in lines
    assert any(line.startswith("logits float (batch, time, ") for line in lines)
    assert sum(line.startswith("state_in_") and line.endswith("state, starts as zeros") for line in lines) == 3
    assert any("checks in onnxruntime; largest error" in line for line in lines)


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
