"""The benchmark suite: `python -m benchmarks [NAME ...]`, the same as `make bench` and `thesean bench`.

Without names it runs all but the studies, which take hours; with --quick all of them, in forms that take seconds and
measure nothing. Figures go to build/bench; --record replaces the committed ones, from a clean checkout alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks.suite import ROOT, BenchmarkError, Case, Options, find_cases, pick, run_case
from benchmarks.tables import fill_all
from thesean.errors import TheseanError


def main(arguments: list[str] | None = None, program: str = "python -m benchmarks") -> int:
    """0; 1 when something that a benchmark checks doesn't hold; 2 for a mistake, told in a line."""
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="which ones, a study too (default: all but studies)")
    parser.add_argument("--list", action="store_true", help="tell names and questions, and stop")
    parser.add_argument("--quick", action="store_true", help="the quick forms: everything runs, in seconds, on little")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: build/bench)")
    parser.add_argument("--record", action="store_true", help="replace the committed results: needs a clean checkout")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="other seeds than the benchmark's own")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no row later; studies that can tell of it")
    parser.add_argument(
        "--readme", action="store_true", help="fill README's and docs' tables from the committed results"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a second thread beside a busy process makes both slower, and figures noise
    try:
        return _run(chosen)
    except TheseanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(chosen: argparse.Namespace) -> int:
    if chosen.list:
        for name, case in find_cases().items():
            print(f"{name:16s} {case.minutes:4g} min  {case.question}{_lack(case)}")
        return 0
    # quick forms apart, so that seconds of nothing don't replace hours of figures
    out = chosen.out or ROOT / "build" / "bench" / ("quick" if chosen.quick else "")
    seeds = None if chosen.seeds is None else tuple(chosen.seeds)
    options = Options(
        out=out, quick=chosen.quick, record=chosen.record, only=tuple(chosen.only), seeds=seeds, minutes=chosen.minutes
    )
    options.check()
    every = find_cases()
    cases = {name: pick(every, name) for name in chosen.names}
    if not cases and not chosen.readme:
        cases = every if chosen.quick else find_cases(["benchmarks"])
        for name in [n for n, case in cases.items() if case.missing()]:
            print(f"{name} is left out:{_lack(cases.pop(name))}")
    faults = []
    for name, case in cases.items():
        print(f"\n{name}: {case.question}", flush=True)
        result, found = run_case(name, case, options)
        if case.table is not None:
            print(f"\n{case.table(result)}")
        faults += [f"{name}: {fault}" for fault in found]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    if chosen.readme:
        if faults:
            raise BenchmarkError("no table was filled: mend the faults above first.")
        filled = fill_all()
        for path in filled:
            print(f"filled {path.relative_to(ROOT)}")
        if not filled:
            print("every table was as its result says")
    return 1 if faults else 0


def _lack(case: Case) -> str:
    missing = case.missing()
    return f" (needs {', '.join(missing)})" if missing else ""


if __name__ == "__main__":
    sys.exit(main())
