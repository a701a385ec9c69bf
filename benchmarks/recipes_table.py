"""Rewrite the README's table of recipes from benchmarks/results/recipes.json.

python benchmarks/recipes_table.py            # rewrites the part between <!-- table:recipes --> marks
python benchmarks/recipes_table.py --check    # exit 1 when the README is stale
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from readme_table import ROOT, replace_table

from thesean.report.markdown import provenance


def table(results: dict[str, Any]) -> str:
    """Best first: mean loss over seeds with its range, the hybrids' losses after the first and last stage, seconds."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in results["runs"]:
        runs[run["name"]].append(run)
    budget = results["budget"]
    size = f"{budget['steps']} steps of {budget['batch']} x {budget['length']}"
    guide = results["runs"][0]["guide"]
    lines = [
        f"{size} characters (`fast`: none); the guide is at {guide:.3f} nats, a uniform guess at 4.56.",
        "",
        "| run | seeds | loss | after the first stage | after the last | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in sorted(runs.items(), key=lambda item: _mean(item[1], "loss")):
        losses = [r["loss"] for r in rows]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(rows) > 1 else ""
        first, last = (_stage(rows, at) for at in (0, -1))
        seconds = round(_mean(rows, "seconds"))
        lines.append(f"| {name} | {len(rows)} | {_mean(rows, 'loss'):.3f}{spread} | {first} | {last} | {seconds} |")
    return "\n".join([*lines, "", provenance(results)])


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(r[key] for r in rows)


def _stage(rows: list[dict[str, Any]], at: int) -> str:
    found = [r["stages"][at] for r in rows if r["stages"]]
    return f"{statistics.fmean(found):.3f}" if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "benchmarks" / "results" / "recipes.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the table is stale")
    options = parser.parse_args()
    before = options.readme.read_text(encoding="utf-8")
    after = replace_table(before, "recipes", table(json.loads(options.results.read_text(encoding="utf-8"))))
    if options.check:
        print("up to date" if before == after else f"{options.readme} is stale: run benchmarks/recipes_table.py")
        return int(before != after)
    options.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
