"""Which tests come by which lines: found once, and again for what is new alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.mutation.come_by import ComeBy, Seen, come_by, note

SOURCE = "def one(x):\n    return x + 1\n\n\ndef two(x):\n    return x + 2\n"


class Suite:
    """Tests by name, run as they would be: each comes by the lines that it is said to."""

    def __init__(self, lines: dict[str, list[int]]) -> None:
        self.lines = lines
        self.ran: list[str] = []

    def find(self) -> ComeBy:
        self.ran = []

        def run(tests: list[str]) -> None:
            self.ran += tests
            for test in tests:
                if self.lines[test]:  # the others fail
                    note(Path("lines.json"), test, 0.5, {"source.py": self.lines[test]})

        return come_by(self.lines, ["source.py"], Path("lines.json"), run)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.chdir(tmp_path)
    Path("source.py").write_text(SOURCE)
    Path("test_a.py").write_text("a")
    Path("test_b.py").write_text("b")
    return Suite({"test_a.py::one": [2], "test_a.py::fails": [], "test_b.py::two": [6]})


def test_each_test_runs_once_and_what_fails_is_left_out(suite: Suite):
    first = suite.find()
    assert suite.ran == ["test_a.py::one", "test_a.py::fails", "test_b.py::two"]
    assert first.lines == {"test_a.py::one": {"source.py": [2]}, "test_b.py::two": {"source.py": [6]}}
    assert set(first.seconds.values()) == {0.5}
    assert suite.find() == first
    assert suite.ran == []
    assert [p.name for p in Path().glob("lines*")] == ["lines.json"]


def test_what_is_known_of_other_tests_stays(suite: Suite):
    whole = suite.find()
    Suite({"test_b.py::two": [6]}).find()
    assert suite.find() == whole
    assert suite.ran == []
    Path("test_a.py").unlink()
    assert Suite({"test_b.py::two": [6]}).find().lines == {"test_b.py::two": {"source.py": [6]}}


def test_what_an_interrupted_run_noted_is_not_run_again(suite: Suite):
    note(Path("lines.json"), "test_b.py::two", 0.25, {"source.py": [6]})
    note(Path("lines.json"), "test_a.py::one", 0.25, {"source.py": [2]})
    Path("test_a.py").write_text("a, changed since")
    assert suite.find().seconds == {"test_a.py::one": 0.5, "test_b.py::two": 0.25}
    assert suite.ran == ["test_a.py::one", "test_a.py::fails"]


def test_tests_of_a_file_that_changed_run_again(suite: Suite):
    suite.find()
    Path("test_b.py").write_text("b, changed")
    suite.find()
    assert suite.ran == ["test_b.py::two"]


def test_lines_move_with_their_function_and_a_changed_one_is_come_by_as_a_whole(suite: Suite):
    suite.find()
    Path("source.py").write_text("import os\n\n" + SOURCE.replace("    return x + 2", "    y = x\n    return y + 2"))
    found = suite.find()
    assert suite.ran == []
    assert found.lines == {"test_a.py::one": {"source.py": [4]}, "test_b.py::two": {"source.py": [7, 8, 9]}}


def test_lines_are_seen_where_they_run(tmp_path: Path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    held: dict = {}
    exec(compile(SOURCE, str(path), "exec"), held)
    seen = Seen({str(path): "source.py"})
    with seen:
        held["two"](1)
    assert {file: sorted(lines) for file, lines in seen.lines.items()} == {"source.py": [5, 6]}
