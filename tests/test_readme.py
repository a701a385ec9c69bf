"""The tables of README and docs are those of the committed results."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What makes a table; the others are made from a report by readme_table.py
SCRIPTS = {name: f"{name}_table.py" for name in ("auto", "minilm", "plan", "recipes")}

TABLES = [
    pytest.param(path, name, id=f"{path.name}-{name}")
    for path in DOCUMENTS
    for name in re.findall(r"<!-- table:([\w-]+) -->", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("document", "name"), TABLES)
def test_a_table_is_up_to_date(
    document: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = SCRIPTS.get(name, "readme_table.py")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "argv", [script, str(RESULTS / f"{name}.json"), "--readme", str(document), "--check"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert capsys.readouterr().out == "up to date\n"
    assert not stopped.value.code


@pytest.mark.parametrize(("document", "name"), TABLES)
def test_a_table_is_of_committed_code(document: Path, name: str) -> None:
    commit = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["environment"]["commit"]
    assert re.fullmatch("[0-9a-f]{7,40}", commit)
