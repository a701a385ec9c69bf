"""Faults that are put into the code: which there are, and that a live function takes them up."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.mutation.changes import Live, drawn, mutants, now
from benchmarks.mutation.come_by import ComeBy
from benchmarks.mutation.plugin import Tried
from benchmarks.studies import survivors
from benchmarks.studies.mutants import score, table
from benchmarks.suite import ROOT

SOURCE = '''
"""A module."""
import logging
from collections.abc import Callable
logger = logging.getLogger(__name__)
LIMIT = 3


def first(values: list, most: int = 2) -> int:
    """The first of the values that is small."""
    logger.info("asked for %d", 1)
    assert most > 0, "more"
    for value, _ in zip(values, values, strict=True):
        if not value < most and value is not None:
            continue
        return value
    raise ValueError(f"none below {most + 1}")


def above(least: int) -> Callable:
    def fits(value: int) -> bool:
        return value > least

    return fits


three = above(3)


class Holder:
    def all_of(self, values: list) -> bool:
        inner = lambda v: v == 1
        return all(inner(v) for v in values if v)

    def any_of(self) -> bool:
        return False
'''


@pytest.fixture
def module(tmp_path: Path) -> tuple[ModuleType, Path]:
    path = tmp_path / "held.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("held", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made, path


def test_faults_are_of_what_runs_in_functions_and_not_of_what_is_said(module):
    _, path = module
    found = [(m.function[0], m.line, m.what) for m in mutants(path, "held.py")]
    assert found == [
        ("first", 14, "condition negated"),
        ("first", 14, "And -> Or"),
        ("first", 14, "no Not"),
        ("first", 14, "Lt -> LtE"),
        ("first", 14, "IsNot -> Is"),
        ("first", 15, "no Continue"),
        ("first", 16, "returns None"),
        ("first", 17, "no Raise"),
        ("above", 22, "returns None"),
        ("above", 22, "Gt -> GtE"),
        ("above", 24, "returns None"),
        ("Holder.all_of", 32, "Eq -> NotEq"),
        ("Holder.all_of", 32, "1 -> 2"),
        ("Holder.all_of", 33, "returns None"),
        ("Holder.all_of", 33, "all -> any"),
        ("Holder.all_of", 33, "no filter"),
        ("Holder.any_of", 36, "False -> True"),  # and not None, which is as false
    ]
    assert {m.last_line for m in mutants(path, "held.py") if m.line == 14} == {14}
    assert len({m.name for m in mutants(path, "held.py")}) == len(found)


@pytest.mark.parametrize(
    ("what", "call", "before", "after"),
    [
        ("Lt -> LtE", lambda m: m.first([2, 1]), 1, 2),
        ("no Continue", lambda m: m.first([3]), ValueError, 3),
        ("no Raise", lambda m: m.first([3]), ValueError, None),
        ("all -> any", lambda m: m.Holder().all_of([1, 2]), False, True),
        ("no filter", lambda m: m.Holder().all_of([1, 0]), True, False),
        ("1 -> 2", lambda m: m.Holder().all_of([1]), True, False),
        ("Gt -> GtE", lambda m: m.three(3), False, True),  # made before the fault was there
    ],
)
def test_a_live_function_takes_a_fault_up(what, call, before, after, module):
    made, path = module

    def found() -> object:
        try:
            return call(made)
        except ValueError:
            return ValueError

    assert found() == before
    assert Live().take_up(next(m for m in mutants(path, "held.py") if m.what == what), path)
    assert found() == after


def test_a_function_that_nothing_holds_takes_nothing_up(module):
    made, path = module
    fault = mutants(path, "held.py")[0]
    del made.first
    assert not Live().take_up(fault, path)


def test_a_file_of_which_nothing_is_there_is_told(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text(SOURCE)
    with pytest.raises(LookupError, match=r"nothing of .*elsewhere\.py is there"):
        Live().take_up(mutants(elsewhere, "elsewhere.py")[0], elsewhere)


def test_what_was_frozen_is_found(module):
    _, path = module
    gc.freeze()
    assert Live().take_up(mutants(path, "held.py")[0], path)


def test_the_score_is_of_what_could_be_tried():
    rows = [
        {"name": f"thesean/{place}/x.py:1 a ({k})", "outcome": outcome}
        for k, (place, outcome) in enumerate(
            [("passes", "killed"), ("passes", "survived"), ("passes", "not taken up"), ("deploy", "no end"),
             ("deploy", "died"), ("deploy", "broken"), ("distill", "not run")]
        )
    ]  # fmt: skip
    assert score(rows) == 3 / 5
    assert score([]) is None
    lines = table({"cases": rows, "details": {"left_out": [{"name": "x", "seed": 0}]}}).splitlines()
    assert lines[2:] == [
        "| thesean/deploy | 3 | 2 | 0 | 0 | 100% |",
        "| thesean/distill | 1 | 0 | 0 | 1 | 0% |",
        "| thesean/passes | 3 | 1 | 1 | 0 | 50% |",
        "| all | 7 | 3 | 1 | 1 | 60% |",
        "| not tried | 1 | | | | |",
    ]


def test_what_survives_is_looked_at_by_whole_files_the_own_ones_first_and_in_their_order():
    file = "thesean/passes/simplify.py"
    (fault,) = (m for m in mutants(ROOT / file, file) if m.what == "Eq -> NotEq" and "dims" in line_of(file, m.line))
    known = ComeBy(
        seconds={"tests/test_large.py::b": 9.0, "tests/test_large.py::c": 9.0, "tests/passes/test_simplify.py::a": 50.0,
                 "tests/test_small.py::e": 0.5, "tests/test_small.py::d": 0.5, "tests/test_other.py::f": 1.0},
        lines={"tests/test_large.py::b": {file: [fault.line]}, "tests/test_large.py::c": {},
               "tests/passes/test_simplify.py::a": {}, "tests/test_small.py::e": {},
               "tests/test_small.py::d": {file: [fault.line]}, "tests/test_other.py::f": {file: [fault.line + 99]}},
    )  # fmt: skip
    tried = Tried({}, known, [1, 5], 60)
    small = ["tests/test_small.py::e", "tests/test_small.py::d"]
    own, large = ["tests/passes/test_simplify.py::a"], ["tests/test_large.py::b", "tests/test_large.py::c"]
    assert tried.whole_files(fault, 49, []) == own  # at least one
    assert tried.whole_files(fault, 60, small) == own + small
    assert tried.whole_files(fault, 90, []) == own + small + large


def test_a_fault_is_found_again_where_its_line_has_moved():
    file = "thesean/passes/simplify.py"
    every = mutants(ROOT / file, file)
    (fault,) = (m for m in every if m.what == "Eq -> NotEq" and "dims" in line_of(file, m.line))
    assert now(f"{file}:{fault.line - 3} Eq -> NotEq (0)", every) == fault
    assert now(f"{file}:{fault.line} Eq -> IsNot (0)", every) is None
    assert now("thesean/gone.py:3 Eq -> NotEq (0)", every) is None


def test_a_draw_stays_while_lines_move_and_a_seed_is_another(module, tmp_path: Path):
    _, path = module
    every = mutants(path, "held.py")
    names = [mutant.name for mutant in drawn(every, 1, 5)]
    moved = tmp_path / "moved.py"
    moved.write_text("X = 1\n\n\ndef added():\n    return bool(X)\n\n" + SOURCE)
    among = {m.name for m in drawn(mutants(moved, "held.py"), 1, 8)}
    assert len(set(names)) == 5
    assert {now(name, mutants(moved, "held.py")).name for name in names} <= among  # beside what was added
    assert names != [mutant.name for mutant in drawn(every, 2, 5)]
    assert sorted(drawn(every, 1, 10**6), key=lambda m: m.number) == every


def test_what_is_noticed_by_now_counts_with_what_was_before():
    names = (
        "thesean/passes/x.py:1 a (1)",
        "thesean/passes/x.py:2 b (2)",
        "thesean/deploy/y.py:3 c (3)",
        "thesean/deploy/y.py:4 d (4)",
    )
    outcomes = ("killed", "survived", "gone", "not run")
    rows = [{"name": name, "outcome": outcome} for name, outcome in zip(names, outcomes, strict=True)]
    lines = survivors.table({"cases": rows, "details": {"noticed": 90, "of": 94}}).splitlines()
    assert lines[2:] == [
        "| thesean/deploy | 2 | 0 | 1 | 1 |",
        "| thesean/passes | 2 | 1 | 0 | 1 |",
        "| all | 4 | 1 | 1 | 2 |",
        "",
        "With what was noticed before: 91 of 93, 98%.",
    ]


def test_each_look_goes_on_where_the_one_before_saw_nothing(monkeypatch):
    file = "thesean/passes/simplify.py"
    fault = mutants(ROOT / file, file)[0]
    tests = ["tests/a.py::first", "tests/a.py::second", "tests/passes/test_simplify.py::third"]
    known = ComeBy(dict.fromkeys(tests, 1.0), {tests[0]: {file: [fault.line]}, tests[1]: {}, tests[2]: {}})
    tried, runs = Tried({}, known, [1, 5], 60), []

    def of(_, names, most):
        runs.append(names)
        return ("killed", tests[1]) if tests[1] in names else ("survived", "")

    monkeypatch.setattr(tried, "_of", of)
    monkeypatch.setattr(tried, "_is_sound", lambda test: True)
    found = tried(fault)
    assert (found["outcome"], found["by"], found["tests"]) == ("killed", tests[1], 3)
    assert runs == [[tests[0]], [tests[2], tests[0], tests[1]]]  # the second look has no other test that comes by
    del known.lines[tests[0]], known.lines[tests[2]]
    assert tried(fault)["outcome"] == "not run"


def line_of(file: str, number: int) -> str:
    return (ROOT / file).read_text(encoding="utf-8").splitlines()[number - 1]


def test_what_survived_is_tried_with_tests_that_have_changed_since(monkeypatch):
    told = "tests/passes/test_x.py\ntests/passes/tools.py\ntests/docs/test_documents.py\ntests/test_y.py"
    asked: list[tuple[str, ...]] = []

    def git(*words: str) -> str:
        asked.append(words)
        return told

    monkeypatch.setattr(survivors, "git", git)
    assert survivors.changed_since("0a1b2c") == ["tests/passes/test_x.py", "tests/test_y.py"]
    assert "0a1b2c" in asked[0]
    monkeypatch.setattr(survivors, "git", lambda *words: None)
    assert survivors.changed_since("0a1b2c") == []
