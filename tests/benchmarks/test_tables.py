"""Tables between marks: what fills them, what is refused, and that the committed ones are up to date."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables, tradeoffs
from benchmarks.suite import KEYS, RESULTS, BenchmarkError, Case, find_cases, is_clean, read_result
from tests.report.points import FOUND
from thesean.errors import UnknownNameError

TEXT = "# Thesean\n<!-- table:speed -->\nstale\n<!-- /table:speed -->\nend\n"
ENVIRONMENT = {"cpu": "Chip", "cores": 2, "python": "3.11.7", "date": "2026-01-02T03:04:05+00:00"}


def speeds(result: dict[str, Any]) -> str:
    return "\n".join(f"{row['name']}: {row['ms']} {result['unit']}" for row in result["cases"])


CASES = {
    "speed": Case(question="How fast?", minutes=1, unit="ms", run=lambda run: None, table=speeds),
    "later": Case(question="When?", minutes=90, unit="s", run=lambda run: None, table=speeds),
    "bare": Case(question="What?", minutes=1, unit="s", run=lambda run: None),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path)
    return tmp_path


def record(folder: Path, **changes: Any) -> None:
    result = {
        "benchmark": "speed", "unit": "ms", "seeds": [3], "settings": {}, "quick": False, "commit": "abc",
        "environment": ENVIRONMENT, "cases": [{"name": "gru", "ms": 2}], "details": {},
    }  # fmt: skip
    (folder / "speed.json").write_text(json.dumps(result | changes))


def filled(folder: Path) -> str:
    return tables.fill(TEXT, lambda name: tables.made(name, CASES, folder))


def test_what_is_between_the_marks_is_replaced_and_nothing_else(folder):
    once = filled(folder)
    assert once == (
        "# Thesean\n<!-- table:speed -->\ngru: 2 ms\n\n"
        "Measured on Chip, 2 cores, Python 3.11.7, commit abc, seed 3, 2026-01-02.\n<!-- /table:speed -->\nend\n"
    )
    assert tables.fill(once, lambda name: tables.made(name, CASES, folder)) == once


def test_several_tables_of_one_file_are_filled():
    text = TEXT + TEXT.replace("speed", "later")
    assert tables.fill(text, str.upper) == text.replace("stale", "SPEED", 1).replace("stale", "LATER")


@pytest.mark.parametrize("text", ["", "<!-- /table:demo --><!-- table:demo -->", "<!-- table:demo -->" * 2])
def test_marks_that_are_missing_reversed_or_doubled_are_refused(text):
    with pytest.raises(ValueError, match="once each"):
        tables.replace_table(text, "demo", "x")


@pytest.mark.parametrize("text", ["<!-- table:demo -->", "<!-- /table:demo -->", TEXT + TEXT])
def test_a_mark_without_its_other_half_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        tables.fill(text, str)


@pytest.mark.parametrize(("commit", "found"), [("abc-dirty", "abc-dirty"), (None, "no commit")])
def test_a_figure_of_uncommitted_code_is_refused_with_the_files_name_and_what_to_do(folder, commit, found):
    record(folder, commit=commit)
    with pytest.raises(BenchmarkError, match=rf"speed\.json was measured at {found}: .*benchmarks speed --record"):
        filled(folder)


def test_a_picture_goes_with_its_table_and_is_drawn_of_committed_code_alone(folder):
    drawn = {"speed": replace(CASES["speed"], picture=lambda result: f"<svg>{result['cases'][0]['ms']}</svg>")}
    assert tables.made("speed", drawn, folder).startswith("![How fast?](pictures/speed.svg)\n\ngru: 2 ms")
    assert tables.pictures(drawn, folder) == {tables.PICTURES / "speed.svg": "<svg>2</svg>"}
    record(folder, commit="abc-dirty")
    assert tables.pictures(drawn, folder) == {}
    assert tables.pictures(CASES, folder) == {}


def test_quality_against_latency_is_a_table_with_stars_and_a_picture():
    told = {"unit": FOUND.unit, "judged": FOUND.judged, "notes": list(FOUND.notes)}
    result = {"cases": [asdict(p) for p in FOUND], "details": told}
    assert tradeoffs.read(result) == FOUND
    lines = tradeoffs.table(result).splitlines()
    assert lines[2].startswith("|  | loss | divergence | parameters | file | token 8 | token 64 | prefill 8 |")
    assert "| 1 ms\\* | 9 ms\\* |" in lines[4]
    assert tradeoffs.picture(result) == FOUND.svg()


def test_a_mark_of_no_benchmark_is_refused_with_the_nearest_name(folder):
    with pytest.raises(UnknownNameError, match="unknown benchmark 'sped'; did you mean 'speed'"):
        tables.made("sped", CASES, folder)


def test_a_benchmark_without_figures_or_without_a_table_has_none(folder):
    with pytest.raises(BenchmarkError, match=r"table:later has no figures: expected later\.json"):
        tables.made("later", CASES, folder)
    with pytest.raises(BenchmarkError, match="table:bare has no table"):
        tables.made("bare", CASES, folder)


def test_the_list_tells_question_script_result_and_minutes(folder):
    record(folder, commit="abc-dirty")
    lines = tables.made("benchmarks", CASES, folder).splitlines()
    assert lines[0] == "| question | script | result | minutes |"
    assert "[speed.json](results/speed.json), of uncommitted code: in no table" in lines[2]
    assert lines[3].endswith("| not measured yet | 90 |")


def test_no_committed_table_is_stale():
    """README.md, docs/ and benchmarks/README.md, as `python -m benchmarks --readme` would write them."""
    assert tables.fill_all(write=False) == []


def test_there_are_committed_tables_to_check():
    marked = {name for path in tables.markdown_files() for name in tables.names(path.read_text(encoding="utf-8"))}
    assert {"benchmarks", "demo"} <= marked


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_each_committed_result_is_a_whole_run_of_a_benchmark_in_the_one_shape(path):
    result, case = read_result(path), find_cases()[path.stem]
    assert tuple(result) == KEYS
    assert (result["benchmark"], result["quick"]) == (path.stem, False)
    rows = [(row["name"], row.get("seed")) for row in result["cases"]]
    assert rows
    assert len(set(rows)) == len(rows)
    assert {seed for _, seed in rows} <= {None, *result["seeds"]}
    if case.table is not None and is_clean(result["commit"]):
        assert case.table(result).count("|") > 4
