"""A pytest plugin: instead of running what was collected, take up one fault after another, each in a process of its own
that has everything imported, and run the tests that come by its line until one fails.

Which tests those are is found first (`come_by.py`), by running all of them once, and kept beside the result. What a
fixture of a module makes, or a capture that equal guides share, is made in the time of the first test that asks for it:
the others, which look at it, come by no line of what made it. So what survives is looked at once more by whole files.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.mutation.changes import Live, Mutant, drawn, mutants, now
from benchmarks.mutation.come_by import ComeBy, Seen, come_by, cpu_seconds, note

ROOT = Path(__file__).resolve().parents[2]
# What the first capture and the first export of a process import, in seconds each.
_HEAVY = ("torch._dynamo", "torch.export", "torch.onnx._internal.exporter._core", "onnxruntime", "transformers")
_TOLD = ("survived", "killed", "not taken up", "no end", "broken")
_SURVIVED, _KILLED, _NOT_TAKEN_UP, _ENDLESS, _BROKEN = range(5)
_TICK = 0.005


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
    kept = Path(asked["lines"])
    known = come_by(items, files, kept, lambda tests: _trace([items[t] for t in tests], files, kept))
    if asked["part"] is None:
        return True
    every = [m for file in files for m in mutants(ROOT / file, file)]
    if asked["names"] is None:
        draw = drawn(every, asked["seed"], asked["count"])
        sample: list[tuple[str, Mutant | None]] = [(mutant.name, mutant) for mutant in draw]
    else:
        sample = [(name, now(name, every)) for name in asked["names"]]
    tried = Tried(items, known, asked["looks"], asked["whole_files"])
    part, of = asked["part"]
    with os.fdopen(asked["pipe"], "w", buffering=1) as told:
        for name, mutant in sample[part::of]:
            if name in asked["held"]:
                continue
            row: dict[str, object] = {"left_out": True}
            if time.monotonic() <= asked["until"]:
                row = {"outcome": "gone"} if mutant is None else tried(mutant)
            told.write(json.dumps({"name": name, **row}) + "\n")
    return True


def _trace(tests: list[pytest.Item], files: list[str], kept: Path) -> None:
    def all_of_them() -> int:
        seen = Seen({str(ROOT / file): file for file in files})
        for item, following in zip(tests, [*tests[1:], None], strict=True):
            start = cpu_seconds()
            if _passes(item, following, seen):
                lines = {file: sorted(found) for file, found in seen.lines.items()}
                note(kept, item.nodeid, round(cpu_seconds() - start, 3), lines)
        return 0

    _forked(all_of_them, None)


class _Outcome:
    def __init__(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed


def _passes(item: pytest.Item, following: pytest.Item | None, seen: Seen | None = None) -> bool:
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


class Tried:
    """Tries one fault after another; tests that have found one in a function come first for the next one there."""

    def __init__(
        self, items: dict[str, pytest.Item], known: ComeBy, looks: Sequence[float], whole_files: float
    ) -> None:
        self.items, self.known = items, known
        self.looks = [*((self._tests, most) for most in looks), (self.whole_files, whole_files)]
        self.live = Live()
        self.found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.sound: dict[str, bool] = {}

    def __call__(self, mutant: Mutant) -> dict[str, object]:
        start, outcome, by = cpu_seconds(), "not run", ""
        run: list[str] = []
        for look, most in self.looks:
            while tests := look(mutant, most, run):
                seconds = sum(self.known.seconds[t] for t in tests)
                outcome, by = self._of(mutant, tests, 30 + 5 * seconds)
                if not by or self._is_sound(by):
                    run += [test for test in tests if test not in run]
                    break
                outcome, by = _TOLD[_SURVIVED] if run else "not run", ""
            if outcome not in (_TOLD[_SURVIVED], "not run"):
                break
        if by:
            self.found[mutant.file, mutant.function[0]][by] += 1
        return {"outcome": outcome, "by": by, "tests": len(run), "seconds": round(cpu_seconds() - start, 2)}

    def _is_sound(self, test: str) -> bool:
        """Whether a test passes without a fault; one that doesn't is never run again."""
        if test not in self.sound:
            item = self.items[test]
            most = 30 + 5 * self.known.seconds[test]
            self.sound[test] = _forked(lambda: _SURVIVED if _passes(item, None) else _KILLED, most) == _SURVIVED
        if not self.sound[test]:
            del self.known.lines[test]
        return self.sound[test]

    def _comes_by(self, test: str, mutant: Mutant) -> bool:
        return any(mutant.line <= n <= mutant.last_line for n in self.known.lines[test].get(mutant.file, ()))

    def _tests(self, mutant: Mutant, most: float, run: Collection[str]) -> list[str]:
        """Those that come by the line and weren't run before, as many as take `most` seconds: those that found another
        fault of the function, those of the file's own name, then one of each file in turn, those of the folder's own
        first, the fastest of each first.
        """
        files: dict[str, list[str]] = defaultdict(list)
        for test in self.known.lines:
            if test not in run and self._comes_by(test, mutant):
                files[test.partition("::")[0]].append(test)
        source = Path(mutant.file)
        folder = "/".join(("tests", *source.parts[1:-1]))
        found, seconds = self.found[mutant.file, mutant.function[0]], self.known.seconds
        turns: list[tuple[int, bool, int, bool, float, str]] = []
        for file, tests in files.items():
            own, near = f"test_{source.stem}" in file, file.startswith(f"{folder}/")
            for turn, test in enumerate(sorted(tests, key=seconds.__getitem__)):
                turns.append((-found[test], not own, turn, not near, seconds[test], test))
        chosen: list[str] = []
        taken = 0.0
        for *_, cost, test in sorted(turns):
            if chosen and taken + cost > most:
                continue
            taken += cost
            chosen.append(test)
        return chosen

    def whole_files(self, mutant: Mutant, most: float, run: Collection[str]) -> list[str]:
        """All tests of the files that come by the line, as many as take `most` seconds: the file's own and the cheapest
        first. They run in their order, those that ran before too: it may be another that makes what they share.
        """
        files: dict[str, list[str]] = defaultdict(list)
        for test in self.known.lines:
            files[test.partition("::")[0]].append(test)
        cost = {file: sum(self.known.seconds[t] for t in tests) for file, tests in files.items()}
        own = f"test_{Path(mutant.file).stem}"
        near = [file for file, tests in files.items() if own in file or any(self._comes_by(t, mutant) for t in tests)]
        chosen: list[str] = []
        taken = 0.0
        for file in sorted(near, key=lambda file: (own not in file, cost[file])):
            if not chosen or taken + cost[file] <= most:
                taken += cost[file]
                chosen += files[file]
        return chosen

    def _of(self, mutant: Mutant, names: list[str], most: float) -> tuple[str, str]:
        """What came of it, and the test that found it."""
        read, write = os.pipe()
        tests = [self.items[name] for name in names]

        def run() -> int:
            if not self.live.take_up(mutant, ROOT / mutant.file):
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
    """The exit code of a copy of this process that runs it; a signal's number below 0. `most` seconds are counted while
    this process runs too: what stops both stops the count.
    """
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
    waited = 0.0
    while True:
        found, status = os.waitpid(child, 0 if most is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if most is not None and waited > most:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return _ENDLESS
        time.sleep(_TICK)
        waited += _TICK
