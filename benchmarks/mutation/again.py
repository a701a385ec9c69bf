"""What survived `mutants`, tried once more by whole files of tests: `python -m benchmarks.mutation.again RESULT.json
LINES.json --out AGAIN.json`.

The study runs those tests that come by a fault's line, as many as take seconds. What a fixture of a module makes, it
makes in the time of the first test that asks for it: the others, which look at it, come by no line of what made it.
Here the files of these tests are run whole, those of the file's own name first, as many as take `--seconds` with a
fault. Of a file that has changed since, the fault is the nearest one that changes the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutation.changes import Live, Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
_ASKED = "THESEAN_FAULT"  # file and number of the fault that this process is to take up


def pytest_collection_finish(session: pytest.Session) -> None:
    """As a plugin, in a process with one fault: everything that tests import is there by now."""
    if asked := os.environ.get(_ASKED):
        file, _, number = asked.rpartition(":")
        import_module(file.removesuffix(".py").replace("/", "."))
        found = next(m for m in mutants(ROOT / file, file) if m.number == int(number))
        if not Live().take_up(found, ROOT / file):
            pytest.exit("not taken up", returncode=7)


def now(name: str) -> Mutant | None:
    """The fault of this name in the code as it is: the nearest to its line that changes the same."""
    place, _, what = name.partition(" ")
    file, _, line = place.rpartition(":")
    what = what.rpartition(" (")[0]
    if not (ROOT / file).exists():
        return None
    alike = [m for m in mutants(ROOT / file, file) if m.what == what]
    return min(alike, key=lambda m: abs(m.line - int(line)), default=None)


def files_for(name: str, lines: dict[str, Any], seconds: float) -> list[str]:
    """Files of tests that come by the line, the file's own and the cheapest first, for so many seconds."""
    file, _, line = name.partition(" ")[0].rpartition(":")
    cost: dict[str, float] = defaultdict(float)
    near = set()
    for test, row in lines.items():
        path = test.partition("::")[0]
        cost[path] += row["seconds"] or 0.0
        if int(line) in row["lines"].get(file, ()):
            near.add(path)
    own = [path for path in cost if f"test_{Path(file).stem}" in path]
    chosen: list[str] = []
    for path in sorted(near | set(own), key=lambda path: (path not in own, cost[path])):
        if not chosen or sum(cost[p] for p in chosen) + cost[path] < seconds:
            chosen.append(path)
    return [path for path in chosen if (ROOT / path).exists()]


def tried(mutant: Mutant, files: list[str], seconds: float) -> tuple[str, str]:
    words = ["-p", "benchmarks.mutation.again", "-p", "no:cacheprovider", "-q", "-x", "-n0", "-m", "not slow"]
    environment = {**os.environ, _ASKED: f"{mutant.file}:{mutant.number}"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, *files], cwd=ROOT, env=environment, capture_output=True, text=True,
            check=False, timeout=60 + 5 * seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "no end", ""
    by = next((line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    told = {0: "survived", 1: "killed", 7: "not taken up"}.get(done.returncode)
    return told or ("died" if done.returncode < 0 else "broken"), by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    asked = parser.parse_args()
    rows = json.loads(asked.result.read_text(encoding="utf-8"))["cases"]
    lines = json.loads(asked.lines.read_text(encoding="utf-8"))["tests"]
    found: list[dict[str, Any]] = json.loads(asked.out.read_text()) if asked.out.exists() else []
    held = {row["name"] for row in found}
    for row in rows:
        if row["outcome"] not in ("survived", "not run") or row["name"] in held:
            continue
        mutant, files = now(row["name"]), files_for(row["name"], lines, asked.seconds)
        outcome, by = ("gone", "") if mutant is None else ("not run", "")
        if mutant is not None and files:
            outcome, by = tried(mutant, files, asked.seconds)
        found.append({"name": row["name"], "outcome": outcome, "by": by})
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{row['name']:90s} {outcome}  {by}", flush=True)


if __name__ == "__main__":
    main()
