"""The rule by which tests belong to `make test-fast`, and the list of what it leaves out and takes in."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.mutation.fast_part import choice
from tests.fast_part import BUDGET_S, LIST, MOST_S, chosen, function_of, listed, told

ROOT = Path(__file__).parent.parent


def test_it_is_the_first_case_of_each_function_that_is_not_left_out_and_what_is_asked_for():
    tests = ["a::x[1]", "a::x[2]", "a::y", "b::z[1]", "b::z[2]", "b::z[3]"]
    assert list(chosen(tests, set(), set())) == ["a::x[1]", "a::y", "b::z[1]"]
    assert list(chosen(tests, {"b::z"}, {"a::x[2]", "b::z[3]"})) == ["a::x[1]", "a::x[2]", "a::y", "b::z[3]"]


def test_the_list_names_tests_that_there_are():
    left_out, kept = listed(LIST.read_text(encoding="utf-8"))
    assert left_out
    assert kept
    for name in left_out | kept:
        file, _, test = function_of(name).partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test.rpartition('::')[2]}\(", source, re.MULTILINE), name


def test_a_costly_test_is_taken_in_where_it_alone_comes_by_lines_and_not_for_a_few():
    def row(seconds: float | None, *lines: int) -> dict[str, object]:
        return {"seconds": seconds, "lines": {"m.py": list(lines)}}

    rows = {
        "a::cheap[1]": row(0.01, 1, 2, 3),
        "a::cheap[2]": row(0.01, 1, 2, 3),
        "a::further[1]": row(0.01, 1),
        "a::further[2]": row(0.01, 4),
        "b::costly": row(1.0, *range(100, 120)),
        "b::too_costly": row(10.0, *range(100, 125)),
        "b::failed": row(None),
    }
    assert choice(rows) == ({"b::costly", "b::too_costly"}, {"a::further[2]", "b::costly"})


def test_the_end_of_a_run_tells_its_cost_and_which_tests_outgrew_theirs():
    lines = list(told({"a::x": MOST_S / 2, "a::y": 3 * MOST_S, "a::z": 3 * MOST_S}, 40.0, {"a::z"}))
    assert lines[0] == f"the fast part took 40 s of CPU time, of {BUDGET_S:.0f}: {6.5 * MOST_S:.0f} of them its tests"
    assert len(lines) == 2
    assert lines[1].startswith(f"{3 * MOST_S} s of CPU time, more than {MOST_S}: a::y.")
