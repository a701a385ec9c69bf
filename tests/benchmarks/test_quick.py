"""The quick form of each benchmark: all of it runs, its result has the one shape, and its table can be made of it."""

from __future__ import annotations

import pytest

from benchmarks.suite import KEYS, Options, find_cases, read_result, run_case

pytestmark = pytest.mark.timeout(600)

# by core seconds: an export takes four, whatever the network's size
_SOON = {"kernels", "planning", "similarity", "digits"}
CASES = find_cases()
EVERY = [pytest.param(n, marks=() if n in _SOON else pytest.mark.slow) for n in CASES]


@pytest.mark.thorough
@pytest.mark.parametrize("name", EVERY)
def test_the_quick_form_fills_a_result_and_its_table(name, tmp_path):
    case = CASES[name]
    if missing := case.missing():
        pytest.skip(f"needs {', '.join(missing)}")
    result, faults = run_case(name, case, Options(out=tmp_path, quick=True))
    assert faults == []
    assert result == read_result(tmp_path / f"{name}.json")
    assert tuple(result) == KEYS
    assert (result["benchmark"], result["quick"]) == (name, True)
    assert {"python", "torch", "cpu", "date"} <= set(result["environment"])
    if name == "kernels":  # measured on a GPU alone
        assert result["cases"] or result["details"]["note"].startswith("No GPU here")
    else:
        assert result["cases"]
        assert all(len(row) > 2 for row in result["cases"])
    if case.table is not None:
        assert "| " in case.table(result)
