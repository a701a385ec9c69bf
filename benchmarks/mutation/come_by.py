"""How long each test takes, and which lines of some files it comes by: found once, kept, found again for what is new.

What is kept is of use beyond its commit. Lines move with the function that they are in; of a function that has changed,
a test that came by it before counts as one that comes by all of it. Tests run again where their own file has changed.
So a test may be chosen for nothing; none is believed before it has passed on code without a fault.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mutation.changes import functions_of

Lines = dict[str, dict[str, list[int]]]  # test -> file -> lines
Table = dict[str, tuple[int, int, str]]  # function -> first line, last line, digest of its source


@dataclass
class ComeBy:
    """CPU seconds of each test that passes, and the lines that it comes by."""

    seconds: dict[str, float]
    lines: Lines


def come_by(tests: Iterable[str], files: list[str], kept: Path, run: Callable[[list[str]], None]) -> ComeBy:
    """Of tests by their pytest names, which begin with the file's. `run` runs some of them in a process of its own and
    calls `note` there after each: where it is interrupted, those that were noted are not run again.
    """
    tests = list(tests)
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"tests": {}, "tables": {}}
    tables = {file: _table(file) for file in {*files, *found["tables"]} if Path(file).exists()}
    moves = {file: _moves(found["tables"].get(file, {}), table) for file, table in tables.items()}
    paths = {_file(t) for t in (*tests, *found["tests"])}
    digests = {path: _digest(Path(path).read_text(encoding="utf-8")) for path in paths if Path(path).exists()}
    rows: dict[str, Any] = {}
    for test, row in found["tests"].items():
        if digests.get(_file(test)) == row["digest"]:
            at = {f: {n for line in lines for n in moves.get(f, {}).get(line, ())} for f, lines in row["lines"].items()}
            rows[test] = {**row, "lines": {f: sorted(lines) for f, lines in at.items() if lines}}
    noted = {t: row for t in tests if t not in rows and (row := _noted(kept, t, digests[_file(t)])) is not None}
    left = [t for t in tests if t not in rows and t not in noted]  # by a run that was interrupted
    if left:
        run(left)
        failed: dict[str, Any] = {"seconds": None, "lines": {}}
        noted |= {t: _noted(kept, t, digests[_file(t)]) or {**failed, "digest": digests[_file(t)]} for t in left}
    _write(kept, rows | noted, tables)
    for test in noted:
        _note(kept, test).unlink(missing_ok=True)
    rows |= noted
    passed = {t: rows[t] for t in tests if rows[t]["seconds"] is not None}
    return ComeBy({t: r["seconds"] for t, r in passed.items()}, {t: r["lines"] for t, r in passed.items()})


def note(kept: Path, test: str, seconds: float, lines: dict[str, list[int]]) -> None:
    """That a test has passed. Called where it ran."""
    digest = _digest(Path(_file(test)).read_text(encoding="utf-8"))
    kept.parent.mkdir(parents=True, exist_ok=True)
    row = {"seconds": seconds, "lines": lines, "digest": digest}
    _note(kept, test).write_text(json.dumps(row), encoding="utf-8")


def _note(kept: Path, test: str) -> Path:
    return kept.with_name(f"{kept.stem}.{_digest(test)[:16]}.json")


def _noted(kept: Path, test: str, digest: str) -> dict[str, Any] | None:
    """What was noted of a test whose file is still that one."""
    path = _note(kept, test)
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return row if row.get("digest") == digest else None


def _write(kept: Path, rows: dict[str, Any], tables: dict[str, Table]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_suffix(f".{os.getpid()}.new")
    beside.write_text(json.dumps({"tests": rows, "tables": tables}), encoding="utf-8")
    beside.replace(kept)


def _file(test: str) -> str:
    return test.partition("::")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _table(file: str) -> Table:
    text = Path(file).read_text(encoding="utf-8")
    lines = text.splitlines()
    found: Table = {}
    for name, function in functions_of(ast.parse(text).body):
        first = min([d.lineno for d in function.decorator_list], default=function.lineno)
        last = function.end_lineno or first
        found[name] = (first, last, _digest("\n".join(lines[first - 1 : last])))
    return found


def _moves(before: Table, now: Table) -> dict[int, list[int]]:
    """Where each line of a file's functions is now; all lines of a function that has changed."""
    found: dict[int, list[int]] = {}
    for name, (first, last, digest) in before.items():
        if name in now:
            place, end, other = now[name]
            for line in range(first, last + 1):
                found[line] = [place + line - first] if digest == other else list(range(place, end + 1))
    return found


def cpu_seconds() -> float:
    """Of this process and of those it waited for. Not the clock's: the machine may be busy, or stopped."""
    return sum(os.times()[:4])


class Seen:
    """Which lines of some files are executed, on this thread."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.lines: dict[str, set[int]] = defaultdict(set)
        self._left: dict[Any, set[int]] = {}

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self.files:
            return None
        left = self._left.get(code)
        if left is None:
            left = self._left[code] = {line for _, _, line in code.co_lines() if line is not None}
        if not left:
            return None
        found = self.lines[self.files[code.co_filename]]

        def local(frame: Any, event: str, _: Any) -> Any:
            found.add(frame.f_lineno)
            left.discard(frame.f_lineno)
            return local

        return local(frame, event, None)

    def __enter__(self) -> None:
        self.lines, self._left = defaultdict(set), {}
        sys.settrace(self)

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)
