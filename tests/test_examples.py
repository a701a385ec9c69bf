"""The demos, end to end, with a few steps: what `make demo` promises to write is there and agrees with itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import thesean

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_language_demo_writes_a_stateful_file_that_continues_text_as_torch_does(tmp_path):
    printed = run("demo_gpt2.py", "--steps", "6", "--repeats", "2", "--out", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["guide", "converted", "scratch", "distillation"]
    assert report["same_text"] is True
    assert len(report["generated"]) == 200
    assert "state_in_0" in printed
    for row in rows.values():
        assert {"loss", "metric", "params", "flops", "onnx_bytes", "latency_ms", "steps", "seconds"} <= set(row)
    assert rows["converted"]["steps"] == rows["scratch"]["steps"] == rows["distillation"]["steps"] == 6
    assert {f"token_{c}" for c in (64, 512, 2048)} <= set(rows["converted"]["latency_ms"])
    # six steps: copied weights and closed forms alone are far ahead of six steps from scratch
    assert rows["guide"]["loss"] < rows["converted"]["loss"] < rows["scratch"]["loss"]
    assert thesean.load(tmp_path / "converted").plan.replaced
    assert (tmp_path / "model.onnx").stat().st_size == rows["converted"]["onnx_bytes"]


def test_the_digits_demo_keeps_the_hybrids_afloat(tmp_path):
    pytest.importorskip("sklearn")
    printed = run("demo_digits.py", "--out", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["guide"]["metric"] > 0.97
    assert all(stage["metric"] > 0.9 for stage in report["stages"])  # chance is 0.1
    assert rows["converted"]["metric"] > 0.97
    assert "accuracy" in printed
