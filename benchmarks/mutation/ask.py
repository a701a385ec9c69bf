"""Faults and tests, handed to pytest processes that try them (`plugin.py`), and what they tell as rows of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.suite import ROOT, Run


def ask(run: Run, seed: int, folder: Path, names: list[str] | None = None, tests: list[str] | None = None) -> None:
    """One process finds out which tests come by what, then each of `jobs` tries its part of the faults: of a draw, or
    those of these names. Tests are those of the settings unless others are named.
    """
    settings = run.settings
    held = [row["name"] for row in run.rows if row["seed"] == seed]
    lines = run.part.with_name("mutants-lines.json")
    tests = [*(settings["tests"] if tests is None else tests), *(f"--ignore={path}" for path in settings["left_out"])]
    words = ["-p", "benchmarks.mutation.plugin", "-p", "no:cacheprovider", "-q", "-m", "not slow"]
    words += ["-o", "timeout=0"]  # by the clock, which goes on where the process is stopped
    jobs = settings["jobs"]
    parts = [[part, jobs] for part in range(jobs)]
    for round_of in ([None], parts):
        read, write = os.pipe()
        children = []
        for part in round_of:
            asked = folder / f"asked-{part and part[0]}.json"
            what = {"seed": seed, "lines": str(lines), "pipe": write, "held": held, "until": run.until, "part": part}
            what["names"] = names
            asked.write_text(json.dumps({**settings, **what}))
            command = [*words, "--mutants", str(asked), f"--basetemp={folder}/tests-{part and part[0]}", *tests]
            children.append(subprocess.Popen([sys.executable, "-m", "pytest", *command], cwd=ROOT, pass_fds=[write]))
        os.close(write)
        with os.fdopen(read) as rows:  # a line is written at once, whoever writes it
            for text in rows:
                row: dict[str, Any] = json.loads(text)
                if row.get("left_out"):
                    run.leave_out(row["name"], seed)
                else:
                    run.add(row.pop("name"), seed=seed, **row)
        for child in children:
            if child.wait():
                run.fault(f"pytest ended with {child.returncode}")
