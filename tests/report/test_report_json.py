from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from thesean.errors import ArtifactError
from thesean.report import Row, read_report, write_report

ROWS = [Row(name="converted", loss=1.4, latency_ms={"token_64": 0.1}), Row(name="guide", loss=1.3, params=10)]


def test_what_is_written_is_read_with_the_contracts_keys(tmp_path: Path) -> None:
    path = write_report(
        tmp_path / "new" / "report.json", ROWS, [{"part": "h.0", "steps": 3}], {"python": "3.11"}, {"seed": 0}
    )
    report = read_report(path)
    assert list(report) == ["rows", "stages", "environment", "seed"]
    assert [row["name"] for row in report["rows"]] == ["guide", "converted"]
    expected = {"name", "loss", "metric", "params", "flops", "onnx_bytes", "latency_ms", "steps", "seconds"}
    assert set(report["rows"][0]) == expected
    assert report["rows"][1]["latency_ms"] == {"token_64": 0.1}
    assert report["stages"] == [{"part": "h.0", "steps": 3}]


def test_values_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.json", [Row(name="guide", loss=math.nan)], [{"after": math.inf}])
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert report["rows"][0]["loss"] is None
    assert report["stages"][0]["after"] is None


def test_a_refused_write_leaves_the_earlier_report_and_no_other_file(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.json", ROWS)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="JSON can't carry"):
        write_report(path, ROWS, extra={"model": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="can't write"):
        write_report(tmp_path / "file" / "r.json", ROWS)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="can't write"):
        write_report(tmp_path / "taken", ROWS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_extra_may_not_replace_the_rows(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'rows'"):
        write_report(tmp_path / "r.json", ROWS, extra={"rows": []})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": []}', '{"rows": [{"loss": 1}], "stages": [], "environment": {}}']
)
def test_a_report_that_is_cut_off_or_incomplete_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"r\.json"):
        read_report(tmp_path / "r.json")


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="can't be read"):
        read_report(tmp_path / "none.json")
