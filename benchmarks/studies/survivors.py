"""Would a test notice by now? What `mutants` left, tried again in the code as it is.

A fault whose line has moved is the nearest one of its file that changes the same; "gone" where none does. What is left
then is told one by one in `mutation/left.md`. Tests are those whose files have changed since the draw: the others
noticed nothing then.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.mutation.ask import ask
from benchmarks.studies import mutants
from benchmarks.suite import RESULTS, Case, Result, Run, git, read_result

_TAKEN_UP = ("survived", "not run", *mutants.NOTICED)


def bench(run: Run) -> None:
    first = read_result(RESULTS / "mutants.json")
    told = Counter(row["outcome"] for row in first["cases"])
    run.keep(of=sum(told[o] for o in _TAKEN_UP), noticed=sum(told[o] for o in mutants.NOTICED), commit=first["commit"])
    names = [row["name"] for row in first["cases"] if row["outcome"] in ("survived", "not run")]
    with tempfile.TemporaryDirectory(prefix="survivors-") as folder:
        tests = run.settings["tests"] or changed_since(first["commit"]) or mutants.CASE.settings["tests"]
        ask(run, run.seeds[0], Path(folder), run.settings["names"] or names, tests)
    if broken := sum(row["outcome"] == "broken" for row in run.rows):
        run.fault(f"{broken} faults could not be tried: what was printed says why")


def changed_since(commit: str | None) -> list[str]:
    """Files of tests that are others than at a commit, or new; none where git doesn't know it."""
    found = git("diff", "--name-only", "--diff-filter=d", str(commit), "--", "tests") or ""
    left_out = tuple(mutants.LEFT_OUT)
    return [path for path in found.split() if Path(path).match("test_*.py") and not path.startswith(left_out)]


def table(result: Result) -> str:
    """Noticed by now and left, by the folder that they are in; the last line counts what was noticed before too."""
    lines = ["| | survived | noticed by now | gone | left |", "|---|---|---|---|---|"]
    for place, rows in mutants.by_place(result["cases"]):
        told = Counter(row["outcome"] for row in rows)
        noticed = sum(told[n] for n in mutants.NOTICED)
        lines.append(f"| {place} | {len(rows)} | {noticed} | {told['gone']} | {len(rows) - noticed - told['gone']} |")
    if left_out := len(result["details"].get("left_out", ())):
        lines.append(f"| not tried | {left_out} | | | |")
    before, of = result["details"]["noticed"], result["details"]["of"] - told["gone"]
    return "\n".join(
        [*lines, "", f"With what was noticed before: {before + noticed} of {of}, {(before + noticed) / of:.0%}."]
    )


CASE = Case(
    question="Would a test notice by now what survived?",
    minutes=25,
    unit="faults",
    run=bench,
    settings={**{k: v for k, v in mutants.CASE.settings.items() if k != "count"}, "tests": None, "names": None},
    quick={
        **{k: v for k, v in mutants.CASE.quick.items() if k != "count"},
        "names": ["thesean/passes/graph/text.py:13 In -> NotIn (4)", "thesean/passes/graph/text.py:1 none (0)"],
    },
    table=table,
    partial=True,
)
