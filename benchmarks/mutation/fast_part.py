"""Writes tests/fast_part.txt: `python -m benchmarks.mutation.fast_part FILE.json ...`, of what `come_by` keeps, such as
build/bench/mutants-lines.json. What the list says of tests that aren't in it stays.

Of each test function the first case belongs to the fast part by tests/fast_part.py's rule. Here those are left out that
take long, and then cases are taken in again, those that come by most lines a second first, until few are left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import filterfalse
from pathlib import Path
from typing import Any

from tests.fast_part import LIST, chosen, function_of, listed

LONG_S = 0.2  # what a first case may take, where lines are traced
LEAST = 8  # lines a second, for which a case is taken in again
_EACH_S = 0.02  # what any test takes: set-up, and telling of it

HEAD = """\
Written by `python -m benchmarks.mutation.fast_part`; tests/fast_part.py says what it means. Lines may be changed by
hand: "-" a function of which `make test-fast` runs no case but those with a "+".
"""


def choice(rows: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Functions to leave out, and cases to run all the same; `rows` are {test: {"seconds", "lines"}} in order."""
    seconds = {test: row["seconds"] for test, row in rows.items() if row["seconds"] is not None}
    lines = {test: {(file, n) for file, ns in rows[test]["lines"].items() for n in ns} for test in seconds}
    first = list(chosen(seconds, set(), set()))
    left_out = {function_of(test) for test in first if seconds[test] > LONG_S}
    reached = set().union(*(lines[test] for test in chosen(seconds, left_out, set())))
    kept: set[str] = set()
    left = {test: lines[test] - reached for test in seconds}
    while left := {test: more for test, found in left.items() if (more := found - reached)}:
        best = max(left, key=lambda test: len(left[test]) / (seconds[test] + _EACH_S))
        if len(left[best]) / (seconds[best] + _EACH_S) < LEAST:
            break
        reached |= left.pop(best)
        kept.add(best)
    return left_out, kept


def main(files: list[str]) -> None:
    rows: dict[str, Any] = {}
    for file in files:
        rows |= json.loads(Path(file).read_text(encoding="utf-8"))["tests"]
    known = set(map(function_of, rows))
    before = (
        set(filterfalse(lambda name: function_of(name) in known, names))
        for names in listed(LIST.read_text(encoding="utf-8"))
    )
    left_out, kept = map(set.union, choice(rows), before)
    text = [*(f"- {name}" for name in sorted(left_out)), *(f"+ {name}" for name in sorted(kept))]
    LIST.write_text("".join(f"# {line}\n" for line in HEAD.splitlines()) + "\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
