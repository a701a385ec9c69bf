"""What all benchmarks share: the case, the file that it fills row by row, turns and percentiles.

A file of this folder that defines CASE is a benchmark of the file's name; studies/ has those that take hours. Each
fills one JSON file, whose keys are KEYS; "cases" holds its rows: a name, a seed where there is one, figures in `unit`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from thesean.errors import TheseanError, unknown_name
from thesean.report import environment
from thesean.write_file import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEYS = ("benchmark", "unit", "seeds", "settings", "quick", "commit", "environment", "cases", "details")

Result = dict[str, Any]


class BenchmarkError(TheseanError):
    """A benchmark that can't run here, or a result that may not be used as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One question and what measures its answer.

    `run` adds rows to a Run, whose settings are `settings`. The quick form shows in seconds that all of it works, and
    measures nothing: settings changed by `quick`, one seed, the rows whose names begin as one of `quick_only`.
    """

    question: str
    minutes: float  # about, on one core
    unit: str
    run: Callable[[Run], None]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quick_only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    needs: tuple[str, ...] = ()  # modules beyond Thesean's own requirements
    table: Callable[[Result], str] | None = None  # Markdown
    partial: bool = False  # whether the table tells of rows that were not measured, so that some may be left out
    picture: Callable[[Result], str] | None = None  # SVG, which goes with the table

    def missing(self) -> list[str]:
        return [name for name in self.needs if find_spec(name) is None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the named benchmarks are to be run. `only`: beginnings of the names of wanted rows, () for all of them.
    `minutes`: no row is begun later than that.
    """

    out: Path = ROOT / "build" / "bench"
    quick: bool = False
    record: bool = False
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    minutes: float | None = None

    def check(self) -> None:
        """Raises BenchmarkError for what would lose, overwrite or misname committed figures."""
        if self.out.resolve().is_relative_to(RESULTS):
            raise BenchmarkError(f"{self.out} holds the committed results. Use --record to replace them on purpose.")
        if not self.record:
            return
        if self.quick or self.only or self.seeds is not None:
            raise BenchmarkError("--record takes whole runs: leave out --quick, --only and --seeds.")
        if not is_clean(commit()):
            raise BenchmarkError(
                f"this checkout is {commit() or 'no git repository'}: figures are recorded of committed code only. "
                "Commit or stash your changes (git status), then record."
            )


class Run:
    """One benchmark while it is measured. Every row is on disk once it is added.

    Until the last one the file is `<name>.part.json`. An interrupted run of the same committed code, settings and
    machine goes on from there; a finished run, or one of uncommitted code, starts anew, and what was interrupted is set
    aside. One that left out rows for want of time names them in the details, under "left_out", and is not finished.
    """

    def __init__(self, name: str, case: Case, options: Options) -> None:
        self.settings: dict[str, Any] = {**case.settings, **(case.quick if options.quick else {})}
        self.seeds = options.seeds or (case.seeds[:1] if options.quick else case.seeds)
        self.only = options.only or (case.quick_only if options.quick else ())
        self._chosen = bool(options.only)
        self.until = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
        self._left_out: dict[tuple[str, int | None], None] = {}
        self.faults: list[str] = []
        self.path = options.out / f"{name}.json"
        self.part = self.path.with_suffix(".part.json")
        found = environment()
        del found["commit"]  # the working directory's, which need not be this checkout
        self.result: Result = {
            "benchmark": name,
            "unit": case.unit,
            "seeds": list(self.seeds),
            "settings": self.settings | ({"only": list(self.only)} if self.only else {}),
            "quick": options.quick,
            "commit": commit(),
            "environment": found,
            "cases": [],
            "details": {},
        }
        self.result = _as_read(self.result)
        self._go_on()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.result["cases"]

    @property
    def details(self) -> dict[str, Any]:
        """What is no row: read it here, `keep` it there."""
        return self.result["details"]

    def wants(self, name: str, seed: int | None = None) -> bool:
        """Whether this row is asked for and not held already, and there is time for it."""
        held = any((row["name"], row.get("seed")) == (name, seed) for row in self.rows)
        if held or (self.only and not name.startswith(self.only)):
            return False
        if time.monotonic() < self.until:
            return True
        self.leave_out(name, seed)
        return False

    def leave_out(self, name: str, seed: int | None = None) -> None:
        """For want of time: the details name it."""
        self._left_out[name, seed] = None

    def add(self, name: str, seed: int | None = None, **figures: Any) -> None:
        """Write a row and print its numbers."""
        self.rows.append(_as_read({"name": name} | ({} if seed is None else {"seed": seed}) | figures))
        self._write()
        of = "" if seed is None else f"seed {seed}  "
        numbers = (f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float))
        print(f"{name:48s} {of}{'  '.join(numbers)}".rstrip(), flush=True)

    def keep(self, **details: Any) -> None:
        """Write what is no row."""
        self.details.update(_as_read(details))
        self._write()

    def fault(self, text: str) -> None:
        """Something that must hold doesn't: told at the end, and the exit code is 1."""
        self.faults.append(text)

    def finish(self) -> Path:
        """The file takes its name. Raises BenchmarkError when rows were asked for that there are none of."""
        if not self.rows and self._chosen:
            raise BenchmarkError(f"{self.result['benchmark']}: no row begins with {' or '.join(self.only)}.")
        self.details.pop("left_out", None)
        if self._left_out:
            self.details["left_out"] = [{"name": name, "seed": seed} for name, seed in self._left_out]
        self._write()
        return self.part.replace(self.path)

    def _write(self) -> None:
        write_text(self.part, json.dumps(self.result, indent=1) + "\n", parents=True)

    def _go_on(self) -> None:
        committed = is_clean(self.result["commit"])
        for path in (self.part, self.path):
            earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            finished = path is self.path and "left_out" not in (earlier or {}).get("details", {})
            if committed and earlier and not finished and _without_rows(earlier) == _without_rows(self.result):
                self.result = earlier
                print(f"goes on: {path} holds {len(self.rows)} rows", flush=True)
                return
            if earlier and path is self.part:
                self._set_aside(earlier)

    def _set_aside(self, earlier: Result) -> None:
        """An interrupted run from which this one doesn't go on: it took a while."""
        rows, now = len(earlier["cases"]), _without_rows(self.result)
        if not rows or not is_clean(earlier["commit"]):
            return
        apart = ", ".join(key for key, value in _without_rows(earlier).items() if value != now.get(key))
        kept = self.path.with_suffix(f".{earlier['commit']}-{rows}.json")
        self.part.replace(kept)
        print(f"starts anew, {apart} being another: the {rows} rows that there were are in {kept}", flush=True)


def _as_read(value: Any) -> Any:
    """The value as it comes back from the file: keys are strings, tuples are lists."""
    return json.loads(json.dumps(value))


def _without_rows(result: Result) -> Result:
    """What has to be the same for a run to go on. A newer build of the system's kernel is no other machine."""
    kept = {key: value for key, value in result.items() if key not in ("cases", "details")}
    return kept | {"environment": {k: v for k, v in result["environment"].items() if k not in ("date", "platform")}}


def run_case(name: str, case: Case, options: Options) -> tuple[Result, list[str]]:
    """Measure it, and with `record` replace the committed result. Returns the result and what failed to hold.

    Raises BenchmarkError where a module is missing, and with `record` where nothing was measured, or the code changed
    meanwhile.
    """
    if missing := case.missing():
        raise BenchmarkError(f"{name} needs {', '.join(missing)}, which is not installed; see benchmarks/README.md.")
    if options.minutes is not None and not case.partial:
        raise BenchmarkError(f"{name}: its table needs every row. Leave out --minutes.")
    start = time.monotonic()
    run = Run(name, case, options)
    case.run(run)
    path = run.finish()
    print(f"{name}: {len(run.rows)} rows in {time.monotonic() - start:.0f} s -> {path}", flush=True)
    if options.record and not run.rows:
        raise BenchmarkError(f"{name}: nothing was measured here, so nothing is recorded.")
    if options.record and not run.faults:
        if commit() != run.result["commit"]:
            raise BenchmarkError(f"{name}: the checkout changed while it was measured. The figures stay in {path}.")
        path = path.replace(RESULTS / path.name)
        print(f"{name}: recorded as {path}", flush=True)
    return run.result, run.faults


def read_result(path: Path) -> Result:
    """A result file. Raises BenchmarkError unless it has the keys of one."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if missing := [key for key in KEYS if key not in result]:
        raise BenchmarkError(f"{path}: expected the keys {', '.join(KEYS)}; {missing[0]!r} is missing.")
    return result


def find_cases(where: Iterable[str] = ("benchmarks", "benchmarks.studies")) -> dict[str, Case]:
    """Name -> case of every file that defines CASE, a folder after the other, in alphabetical order."""
    found: dict[str, Case] = {}
    for package in where:
        for file in sorted(ROOT.joinpath(*package.split(".")).glob("[!_]*.py")):
            case = getattr(import_module(f"{package}.{file.stem}"), "CASE", None)
            if isinstance(case, Case):
                found[file.stem] = case
    return found


def pick(cases: Mapping[str, Case], name: str) -> Case:
    """Raises UnknownNameError, with the nearest name."""
    if name not in cases:
        raise unknown_name("benchmark", name, cases)
    return cases[name]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the 20th and 80th percentile, of at least two values."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), cuts[0], cuts[-1]


def turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Name -> median and 20/80 percentiles in milliseconds. Calls take turns: a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if turn % 2 else -1]:  # no one always follows the same other
            start = time.perf_counter()
            call()
            if turn:  # the first is a warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    names = ("median_ms", "p20_ms", "p80_ms")
    return {
        name: dict(zip(names, (round(v, 3) for v in percentiles(values)), strict=True))
        for name, values in times.items()
    }


def is_clean(commit: str | None) -> bool:
    return commit is not None and not commit.endswith("-dirty")


def commit() -> str | None:
    """This checkout's commit, ending in "-dirty" when a file that figures can depend on differs; None without git.

    New files count, since a file may register itself. Recorded results and the Markdown that is filled from them don't:
    recording one benchmark would make the checkout dirty for the next.
    """
    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    ours = ("--", ".", ":(exclude)benchmarks/results", ":(exclude)*.md")
    return f"{head}-dirty" if git("status", "--porcelain", "--untracked-files=all", *ours) != "" else head


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
