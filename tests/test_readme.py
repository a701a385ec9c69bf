"""The README's tables are those of the committed results."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("readme_table.py", []),
        ("readme_table.py", ["benchmarks/results/demo_digits.json"]),
        ("recipes_table.py", []),
        ("auto_table.py", []),
        ("plan_table.py", []),
        ("minilm_table.py", []),
    ],
)
def test_a_table_is_up_to_date(
    script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "argv", [script, *(str(ROOT / a) for a in arguments), "--check"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert capsys.readouterr().out == "up to date\n"
    assert not stopped.value.code
