"""The frame: rows on disk, interrupted runs, what is recorded and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import suite
from benchmarks.suite import KEYS, BenchmarkError, Case, Options, Run, percentiles, read_result, run_case, turns


@pytest.fixture
def committed(tmp_path, monkeypatch) -> Path:
    """A clean checkout with a committed result of "count"."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "count.json").write_text('"committed"')
    monkeypatch.setattr(suite, "RESULTS", folder)
    monkeypatch.setattr(suite, "commit", lambda: "abc")
    return folder


def options(tmp_path: Path, **changes: Any) -> Options:
    return Options(out=tmp_path / "out", **changes)


def counting(measured: list[tuple[str, int]], stop_after: int = 99, **changes: Any) -> Case:
    """Two rows for each seed; `measured` tells which were; it is interrupted after `stop_after` of them."""

    def bench(run: Run) -> None:
        for name in ("one", "two"):
            for seed in run.seeds:
                if run.wants(name, seed):
                    if len(measured) == stop_after:
                        raise KeyboardInterrupt
                    measured.append((name, seed))
                    run.add(name, seed, figure=run.settings["size"])
        run.keep(sizes={3: (1, 2)})

    common: dict[str, Any] = dict(question="How many?", minutes=1, unit="1", settings={"size": 5}, quick={"size": 1})
    return Case(**{"run": bench} | common | changes)


def test_a_result_has_the_one_shape_and_its_rows(committed, tmp_path):
    result, faults = run_case("count", counting([], seeds=(0, 1)), options(tmp_path))
    assert faults == []
    assert tuple(result) == KEYS
    assert result["cases"][2] == {"name": "two", "seed": 0, "figure": 5}
    assert (result["unit"], result["seeds"], result["settings"]) == ("1", [0, 1], {"size": 5})
    assert (result["quick"], result["commit"], result["details"]) == (False, "abc", {"sizes": {"3": [1, 2]}})
    assert {"python", "torch", "cpu", "date"} <= set(result["environment"])
    assert result == read_result(tmp_path / "out" / "count.json")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["count.json"]


def test_the_quick_form_takes_its_own_settings_one_seed_and_some_rows(committed, tmp_path):
    measured: list[tuple[str, int]] = []
    case = counting(measured, seeds=(4, 5), quick_only=("on",))
    result, _ = run_case("count", case, options(tmp_path, quick=True))
    assert measured == [("one", 4)]
    assert (result["quick"], result["settings"]) == (True, {"size": 1, "only": ["on"]})


def test_rows_and_seeds_can_be_chosen(committed, tmp_path):
    measured: list[tuple[str, int]] = []
    run_case("count", counting(measured), options(tmp_path, only=("two",), seeds=(7,)))
    assert measured == [("two", 7)]
    with pytest.raises(BenchmarkError, match="count: no row begins with three"):
        run_case("count", counting(measured), options(tmp_path, only=("three",)))


def test_an_interrupted_run_of_committed_code_goes_on_and_a_finished_one_starts_anew(committed, tmp_path):
    measured: list[tuple[str, int]] = []
    with pytest.raises(KeyboardInterrupt):
        run_case("count", counting(measured, stop_after=1), options(tmp_path))
    assert not (tmp_path / "out" / "count.json").exists()
    result, _ = run_case("count", counting(measured), options(tmp_path))
    assert measured == [("one", 0), ("two", 0)]
    assert [row["name"] for row in result["cases"]] == ["one", "two"]
    run_case("count", counting(measured), options(tmp_path))
    assert measured == [("one", 0), ("two", 0)] * 2


def test_a_run_out_of_time_names_what_it_left_out_and_goes_on_from_there(committed, tmp_path, monkeypatch):
    measured: list[tuple[str, int]] = []
    monkeypatch.setattr(suite.time, "monotonic", lambda: 90.0 * len(measured))
    case = counting(measured, partial=True, seeds=(0, 1))
    result, _ = run_case("count", case, options(tmp_path, minutes=2))
    assert measured == [("one", 0), ("one", 1)]
    left_out = [{"name": "two", "seed": 0}, {"name": "two", "seed": 1}]
    assert result["details"] == {"sizes": {"3": [1, 2]}, "left_out": left_out}
    result, _ = run_case("count", case, options(tmp_path))
    assert measured == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert "left_out" not in result["details"]
    run_case("count", case, options(tmp_path))
    assert len(measured) == 8


def test_a_table_that_needs_every_row_gets_no_limit_of_time(committed, tmp_path):
    with pytest.raises(BenchmarkError, match="count: its table needs every row"):
        run_case("count", counting([]), options(tmp_path, minutes=2))


@pytest.mark.parametrize("commit", ["abd", "abc-dirty"])
def test_an_interrupted_run_of_other_or_uncommitted_code_starts_anew(committed, tmp_path, monkeypatch, commit):
    measured: list[tuple[str, int]] = []
    if commit.endswith("-dirty"):
        monkeypatch.setattr(suite, "commit", lambda: commit)
    with pytest.raises(KeyboardInterrupt):
        run_case("count", counting(measured, stop_after=1), options(tmp_path))
    monkeypatch.setattr(suite, "commit", lambda: commit)
    run_case("count", counting(measured), options(tmp_path))
    assert measured == [("one", 0), ("one", 0), ("two", 0)]


def test_a_run_goes_on_where_the_systems_kernel_is_another_build(committed, tmp_path, monkeypatch):
    measured: list[tuple[str, int]] = []
    with pytest.raises(KeyboardInterrupt):
        run_case("count", counting(measured, stop_after=1), options(tmp_path))
    found = suite.environment()
    monkeypatch.setattr(suite, "environment", lambda: found | {"platform": "Linux-of-tomorrow"})
    run_case("count", counting(measured), options(tmp_path))
    assert measured == [("one", 0), ("two", 0)]


def test_an_interrupted_run_that_is_not_gone_on_from_is_set_aside(committed, tmp_path, monkeypatch, capsys):
    with pytest.raises(KeyboardInterrupt):
        run_case("count", counting([], stop_after=1), options(tmp_path))
    found = suite.environment()
    monkeypatch.setattr(suite, "environment", lambda: found | {"cores": 99})
    result, _ = run_case("count", counting([]), options(tmp_path))
    assert len(result["cases"]) == 2
    kept = tmp_path / "out" / "count.abc-1.json"
    assert [row["name"] for row in json.loads(kept.read_text())["cases"]] == ["one"]
    said = f"starts anew, environment being another: the 1 rows that there were are in {kept}"
    assert said in capsys.readouterr().out.splitlines()


def test_a_committed_result_is_replaced_only_when_recorded(committed, tmp_path):
    run_case("count", counting([]), options(tmp_path))
    assert (committed / "count.json").read_text() == '"committed"'
    options(tmp_path, record=True).check()
    run_case("count", counting([]), options(tmp_path, record=True))
    assert [row["name"] for row in json.loads((committed / "count.json").read_text())["cases"]] == ["one", "two"]


def test_the_folder_of_committed_results_is_no_place_to_write_to(committed):
    for out in (committed, committed / ".." / "results" / "more"):
        with pytest.raises(BenchmarkError, match="holds the committed results"):
            Options(out=out).check()


@pytest.mark.parametrize("commit", ["abc-dirty", None])
def test_recording_from_uncommitted_code_is_refused(committed, tmp_path, monkeypatch, commit):
    monkeypatch.setattr(suite, "commit", lambda: commit)
    with pytest.raises(BenchmarkError, match=f"this checkout is {commit or 'no git repository'}"):
        options(tmp_path, record=True).check()


@pytest.mark.parametrize("part", [{"quick": True}, {"only": ("one",)}, {"seeds": (0,)}])
def test_recording_a_part_of_a_run_is_refused(committed, tmp_path, part):
    with pytest.raises(BenchmarkError, match="--record takes whole runs"):
        options(tmp_path, record=True, **part).check()


def test_code_that_changes_while_it_is_measured_is_not_recorded(committed, tmp_path, monkeypatch):
    commits = iter(["abc", "abc-dirty"])
    monkeypatch.setattr(suite, "commit", lambda: next(commits))
    with pytest.raises(BenchmarkError, match="count: the checkout changed while it was measured"):
        run_case("count", counting([]), options(tmp_path, record=True))
    assert (committed / "count.json").read_text() == '"committed"'


def test_a_run_that_measures_nothing_or_finds_a_fault_is_not_recorded(committed, tmp_path):
    def nothing(run: Run) -> None:
        run.keep(note="no GPU here")

    with pytest.raises(BenchmarkError, match="nothing was measured here"):
        run_case("count", counting([], run=nothing), options(tmp_path, record=True))

    def broken(run: Run) -> None:
        run.add("one")
        run.fault("it spills")

    assert run_case("count", counting([], run=broken), options(tmp_path, record=True))[1] == ["it spills"]
    assert (committed / "count.json").read_text() == '"committed"'


def test_a_missing_module_is_told_before_anything_runs(committed, tmp_path):
    with pytest.raises(BenchmarkError, match="count needs no_such_module, which is not installed"):
        run_case("count", counting([], needs=("torch", "no_such_module")), options(tmp_path))


def test_the_commit_says_dirty_for_changed_and_new_code_but_not_for_results_and_markdown(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert suite.commit() is None

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    code, result = tmp_path / "thesean" / "a.py", tmp_path / "benchmarks" / "results" / "a.json"
    for file in (code, result, tmp_path / "README.md"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    head = suite.commit()
    assert head is not None
    assert len(head) == 12
    for file in (result, tmp_path / "README.md"):
        file.write_text("changed")
    assert suite.commit() == head
    new = code.with_name("b.py")  # a target registers itself
    new.write_text("")
    assert suite.commit() == f"{head}-dirty"
    new.unlink()
    code.write_text("changed")
    assert suite.commit() == f"{head}-dirty"


def test_percentiles_of_five_values_are_three_of_them():
    assert percentiles([6, 1, 5, 2, 3, 4]) == (3.5, 2.0, 5.0)


def test_calls_that_take_turns_run_as_often_as_one_another_and_each_turn_in_the_other_order():
    said: list[str] = []
    found = turns({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, rounds=2)
    assert said == ["b", "a", "a", "b", "b", "a"]
    assert all(f["p20_ms"] <= f["median_ms"] <= f["p80_ms"] for f in found.values())


def test_every_benchmark_is_found_by_its_file_name():
    found = suite.find_cases()
    files = {p.stem for folder in ("", "studies") for p in (suite.ROOT / "benchmarks" / folder).glob("[!_]*.py")}
    assert set(found) == files - {"suite", "tables", "language", "positions"}
    assert set(suite.find_cases(["benchmarks"])) == {
        n for n in found if not (suite.ROOT / f"benchmarks/studies/{n}.py").exists()
    }


def test_the_list_tells_each_name_and_question_and_runs_nothing(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (name, case) in zip(lines, suite.find_cases().items(), strict=True):
        assert line.startswith(name)
        assert case.question in line


def test_an_unknown_name_is_one_line_with_the_nearest_and_nothing_runs(capsys):
    assert command.main(["kernels", "plannig"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: unknown benchmark 'plannig'; did you mean 'planning'? known: alibi, ")
    assert printed.err.count("\n") == 1


def test_a_benchmark_runs_from_the_command_line_and_prints_its_table(committed, tmp_path, monkeypatch, capsys):
    case = counting([], table=lambda result: f"rows: {len(result['cases'])}")
    monkeypatch.setattr(command, "find_cases", lambda *where: {"count": case})
    assert command.main(["count", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "count: How many?" in printed
    assert printed.endswith("rows: 2\n")


def test_a_fault_is_told_and_is_the_exit_code(committed, tmp_path, monkeypatch, capsys):
    def bench(run: Run) -> None:
        run.add("one", registers=300)
        run.fault("one: 300 registers")

    monkeypatch.setattr(command, "find_cases", lambda *where: {"count": counting([], run=bench)})
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "FAULT count: one: 300 registers\n"


def test_readme_alone_measures_nothing_and_says_what_it_filled(monkeypatch, capsys):
    measured: list[tuple[str, int]] = []
    monkeypatch.setattr(command, "find_cases", lambda *where: {"count": counting(measured)})
    for filled, said in (
        ([suite.ROOT / "README.md"], "filled README.md\n"),
        ([], "every table was as its result says\n"),
    ):
        monkeypatch.setattr(command, "fill_all", lambda filled=filled: filled)
        assert command.main(["--readme"]) == 0
        assert capsys.readouterr().out == said
    assert not measured


def test_without_a_name_what_can_not_run_here_is_left_out_and_told(committed, tmp_path, monkeypatch, capsys):
    measured: list[tuple[str, int]] = []
    cases = {"other": counting([], needs=("no_such_module",)), "count": counting(measured)}
    monkeypatch.setattr(command, "find_cases", lambda *where: dict(cases))
    assert command.main(["--out", str(tmp_path / "out")]) == 0
    assert "other is left out: (needs no_such_module)" in capsys.readouterr().out
    assert len(measured) == 2
