"""A pytest plugin: instead of running what was collected, take up one fault after another, each in a process of its own
that has everything imported, and run the tests that come by its line until one fails.

Which tests those are is found first, by running all of them once, and kept beside the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutation.changes import Mutant, mutants, take_up

ROOT = Path(__file__).resolve().parents[2]
Lines = dict[str, dict[str, list[int]]]  # test -> file -> lines
# What the first capture and the first export of a process import, in seconds each.
_HEAVY = ("torch._dynamo", "torch.export", "torch.onnx._internal.exporter._core", "onnxruntime", "transformers")
_TOLD = ("survived", "killed", "not taken up", "no end", "broken")
_SURVIVED, _KILLED, _NOT_TAKEN_UP, _ENDLESS, _BROKEN = range(5)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutants", type=Path, metavar="FILE.json", help="what to do, as benchmarks/studies/mutants.py says it"
    )


def pytest_runtestloop(session: pytest.Session) -> bool:
    asked = json.loads(session.config.getoption("--mutants").read_text(encoding="utf-8"))
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    session.config.pluginmanager.unregister(terminal)
    items = {item.nodeid: item for item in session.items}
    files = sorted({p.relative_to(ROOT).as_posix() for glob in asked["files"] for p in ROOT.glob(glob)})
    for name in (*_HEAVY, *(file.removesuffix(".py").replace("/", ".") for file in files)):
        with suppress(ImportError):
            import_module(name)
    seconds, lines = _come_by(items, files, Path(asked["lines"]))
    every = [m for file in files for m in mutants(ROOT / file, file)]
    sample = random.Random(asked["seed"]).sample(every, min(asked["count"], len(every)))
    with os.fdopen(asked["pipe"], "w", buffering=1) as told:
        for mutant in sample:
            if mutant.name in asked["held"]:
                continue
            start = time.monotonic()
            tests = _tests_of(mutant, seconds, lines, asked["seconds"])
            outcome, by = ("not run", "")
            if tests:
                outcome, by = _tried(mutant, [items[t] for t in tests], 30 + 5 * sum(seconds[t] for t in tests))
            row = {"outcome": outcome, "by": by, "tests": len(tests), "seconds": round(time.monotonic() - start, 2)}
            told.write(json.dumps({"name": mutant.name, **row}) + "\n")
    return True


def _come_by(items: dict[str, pytest.Item], files: list[str], kept: Path) -> tuple[dict[str, float], Lines]:
    """How long each test that passes takes, and which lines of the files it comes by."""
    sources = hashlib.sha256("".join(sorted(items)).encode())
    for path in sorted((*ROOT.glob("thesean/**/*.py"), *ROOT.glob("tests/**/*.py"))):
        sources.update(path.read_bytes())
    if kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8")))["sources"] == sources.hexdigest():
        return found["seconds"], found["lines"]

    def all_of_them() -> int:
        seen = _Seen({str(ROOT / file): file for file in files})
        seconds: dict[str, float] = {}
        lines: Lines = {}
        tests = list(items.values())
        for item, following in zip(tests, [*tests[1:], None], strict=True):
            start = time.monotonic()
            if _passes(item, following, seen):
                seconds[item.nodeid] = time.monotonic() - start
                lines[item.nodeid] = {file: sorted(found) for file, found in seen.lines.items()}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"sources": sources.hexdigest(), "seconds": seconds, "lines": lines}))
        return 0

    _forked(all_of_them, None)
    found = json.loads(kept.read_text(encoding="utf-8"))
    return found["seconds"], found["lines"]


class _Seen:
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


class _Outcome:
    def __init__(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed


def _passes(item: pytest.Item, following: pytest.Item | None, seen: Any = None) -> bool:
    outcome = _Outcome()
    item.config.pluginmanager.register(outcome)
    try:
        if seen is None:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        else:
            with seen:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    finally:
        item.config.pluginmanager.unregister(outcome)
    return not outcome.failed


def _tests_of(mutant: Mutant, seconds: dict[str, float], lines: Lines, most: float) -> list[str]:
    """The tests that come by the line, as far as time allows: those of the file's own name, then one of each file in
    turn, those of the folder's own first, the fastest of each first.
    """
    place = range(mutant.line, mutant.last_line + 1)
    files: dict[str, list[str]] = defaultdict(list)
    for test, seen in lines.items():
        if any(n in place for n in seen.get(mutant.file, ())):
            files[test.partition("::")[0]].append(test)
    source = Path(mutant.file)
    folder = "/".join(("tests", *source.parts[1:-1]))
    turns: list[tuple[bool, int, bool, float, str]] = []
    for file, tests in files.items():
        own, near = f"test_{source.stem}" in file, file.startswith(f"{folder}/")
        for turn, test in enumerate(sorted(tests, key=seconds.__getitem__)):
            turns.append((not own, turn, not near, seconds[test], test))
    chosen: list[str] = []
    taken = 0.0
    for *_, cost, test in sorted(turns):
        if chosen and taken + cost > most:
            continue
        taken += cost
        chosen.append(test)
    return chosen


def _tried(mutant: Mutant, tests: list[pytest.Item], most: float) -> tuple[str, str]:
    """What came of it, and the test that found it."""
    read, write = os.pipe()

    def run() -> int:
        if not take_up(mutant, ROOT / mutant.file):
            return _NOT_TAKEN_UP
        for item, following in zip(tests, [*tests[1:], None], strict=True):
            if not _passes(item, following):
                os.write(write, item.nodeid.encode())
                return _KILLED
        return _SURVIVED

    code = _forked(run, most)
    os.close(write)
    with os.fdopen(read) as pipe:
        by = pipe.read()
    return "died" if code < 0 else _TOLD[code], by


def _forked(run: Callable[[], int], most: float | None) -> int:
    """The exit code of a copy of this process that runs it; a signal's number below 0."""
    child = os.fork()
    if not child:
        code = _BROKEN
        try:
            os.setpgid(0, 0)  # with what it starts itself
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = None if most is None else time.monotonic() + most
    while True:
        found, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return _ENDLESS
        time.sleep(0.005)
