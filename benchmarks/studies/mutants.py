"""Would a test notice? Small faults are put into the code, one at a time, and the tests that come by are run.

A fault (`mutation/changes.py`) is "killed" where a test fails, "no end" where the tests take five times as long, "died"
where the process does; it "survived" where all pass, and is "not run" where none comes by. The score counts the first
three among all that could be taken up. Tests are those of `make test` that aren't slow: for each fault those of the
file's own name first, then the fastest, as many as take the seconds of `looks`, the second ones where nothing was
noticed, and after those whole files of tests, as many as take those of `whole_files`. Tests are written for what is
left: `survivors` tries it again; `--seeds 3` draws others. A draw goes by a hash of what a fault changes, so that it is
the same one while the code moves.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.mutation.ask import ask
from benchmarks.suite import Case, Result, Run

FILES = [
    f"thesean/{place}"
    for place in (
        "passes/**/*.py",
        "distill/*.py",
        "targets/**/*.py",
        "artifact.py",
        "load_artifact.py",
        "deploy/**/*.py",
    )
]
# What is slow to be told by, or is of other things.
LEFT_OUT = [
    "tests/benchmarks", "tests/docs", "tests/kernels", "tests/similarity", "tests/report", "tests/test_examples.py",
    "tests/test_contributing.py", "tests/test_installed.py", "tests/test_real_packages.py",
]  # fmt: skip
NOTICED = ("killed", "no end", "died")


def bench(run: Run) -> None:
    for seed in run.seeds:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            ask(run, seed, Path(folder))
    told = Counter(row["outcome"] for row in run.rows)
    if told["broken"]:
        run.fault(f"{told['broken']} faults could not be tried: what was printed says why")
    run.keep(outcomes=dict(told), score=score(run.rows))


def score(rows: list[dict[str, Any]]) -> float | None:
    """The share of the faults that could be taken up which something noticed."""
    counted = [row["outcome"] for row in rows if row["outcome"] not in ("not taken up", "broken")]
    return sum(outcome in NOTICED for outcome in counted) / len(counted) if counted else None


def by_place(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by the folder that their fault is in, and all of them."""
    places: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault("/".join(row["name"].split(":")[0].split("/")[:2]), []).append(row)
    return [*sorted(places.items()), ("all", rows)]


def table(result: Result) -> str:
    """Noticed and others, by the folder that they are in."""
    lines = ["| | faults | noticed | survived | no test comes by | score |", "|---|---|---|---|---|---|"]
    for place, rows in by_place(result["cases"]):
        told = Counter(row["outcome"] for row in rows)
        noticed, of = sum(told[n] for n in NOTICED), score(rows)
        share = "-" if of is None else f"{of:.0%}"
        lines.append(f"| {place} | {len(rows)} | {noticed} | {told['survived']} | {told['not run']} | {share} |")
    if left := len(result["details"].get("left_out", ())):
        lines.append(f"| not tried | {left} | | | | |")
    return "\n".join(lines)


CASE = Case(
    question="Would a test notice a fault?",
    minutes=120,
    unit="faults",
    run=bench,
    seeds=(2,),
    settings={
        "files": FILES,
        "tests": ["tests"],
        "left_out": LEFT_OUT,
        "count": 600,
        "looks": [12, 60],
        "whole_files": 20,
        "jobs": 2,
    },
    quick={
        "files": ["thesean/passes/graph/text.py"],
        "tests": ["tests/passes/graph/test_text.py"],
        "left_out": [],
        "count": 3,
        "jobs": 1,
    },
    table=table,
    partial=True,
)
