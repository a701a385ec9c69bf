"""What do hostile and hasty inputs, kills and full disks come to?

Each input in a process and a folder of its own: typed, an error of ours; right, a result that was checked; foreign, any
other error, a crash or a hang; wrong; lost, a file of the user's; executed, code that the input brought. An input more
is a row more in a table of `hostility/`, a kind more a file there.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch

import thesean
from benchmarks.hostility.kills import VICTIMS, killed
from benchmarks.hostility.saved import converted, of_words
from benchmarks.hostility.trial import BAD, VERDICTS, Inputs, tried
from benchmarks.suite import ROOT, Case, Result, Run

# A file of hostility/ with INPUTS, and what its inputs are called.
KINDS = {
    "arguments": "arguments of compile, plan and baseline",
    "calls": "calls, exports and timings",
    "paths": "names that can't be written or read",
    "altered": "saved conversions, altered",
    "disks": "full disks, read-only folders, concurrent writers",
}


def inputs_of(kind: str) -> Inputs:
    found: Inputs = import_module(f"benchmarks.hostility.{kind}").INPUTS
    return found


def bench(run: Run) -> None:
    torch.set_num_threads(1)  # a fork has no other threads
    warnings.simplefilter("ignore")
    converted(), of_words()  # once for all forks
    thesean.plan(converted().module, "narrow", example_inputs=torch.randn(2, 3, 8), progress=False)
    for kind in KINDS:
        inputs = list(inputs_of(kind).items())
        for name, call in inputs[:: run.settings["every"]]:
            if run.wants(f"{kind}: {name}"):
                verdict, said = tried(call)
                run.add(f"{kind}: {name}", verdict=verdict, said=said.replace(f"{ROOT}/", ""))  # wherever it runs
    for name, victim in VICTIMS.items():
        if run.wants(f"kills: {name}"):
            run.add(f"kills: {name}", **killed(victim, run.settings["kills"], run.seeds[0]))
    counts = total(run.rows)
    run.keep(counts=counts, by_kind={kind: total(rows_of(run.rows, kind)) for kind in (*KINDS, "kills")})
    print("  ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS), flush=True)
    for row in run.rows:
        if any(counted(row)[verdict] for verdict in BAD):
            run.fault(f"{row['name']}: {row.get('verdict', counted(row))}: {row.get('said', '')}")


def rows_of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"].startswith(f"{kind}: ")]


def counted(row: dict[str, Any]) -> dict[str, int]:
    """A row of one input, or of many kills."""
    return {verdict: row.get(verdict, int(row.get("verdict") == verdict)) for verdict in VERDICTS}


def total(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {verdict: sum(counted(row)[verdict] for row in rows) for verdict in VERDICTS}


def table(result: Result) -> str:
    """One row a kind, and their sum."""
    kinds = {**KINDS, "kills": "a process killed at a random moment of a write"}
    lines = [f"| what | {' | '.join(VERDICTS)} |", f"|---|{'---:|' * len(VERDICTS)}"]
    for kind, told in kinds.items():
        counts = total(rows_of(result["cases"], kind))
        lines.append(f"| {told} | {' | '.join(str(counts[v]) for v in VERDICTS)} |")
    counts = total(result["cases"])
    lines.append(f"| all | {' | '.join(str(counts[v]) for v in VERDICTS)} |")
    return "\n".join(lines)


CASE = Case(
    question="What do hostile and hasty inputs, kills, full disks and concurrent writers come to?",
    minutes=8,
    unit="inputs",
    run=bench,
    settings={"every": 1, "kills": 30},
    quick={"every": 25, "kills": 2},
    needs=("onnx", "onnxruntime", "onnxscript", "matplotlib"),
    table=table,
)
