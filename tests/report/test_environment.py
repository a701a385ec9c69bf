from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path

import pytest
import torch

from thesean.report import environment
from thesean.report.environment import _cpu_model


def test_the_environment_is_json_and_names_machine_and_versions() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["cpu"]
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is not None


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["commit"] is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert environment()["commit"] == commit[:12]
    (tmp_path / "a").write_text("2")
    assert environment()["commit"] == commit[:12] + "-dirty"


def test_the_processor_is_read_from_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast Chip: 3000\n")
    assert _cpu_model(tmp_path / "cpuinfo") == "Fast Chip: 3000"
    assert _cpu_model(tmp_path / "missing")
