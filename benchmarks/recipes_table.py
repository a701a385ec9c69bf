"""Rewrite the README's table of recipes from benchmarks/results/recipes.json.

python benchmarks/recipes_table.py            # rewrites the part between <!-- table:recipes --> marks
python benchmarks/recipes_table.py --check    # exit 1 when the README is stale
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from typing import Any

from readme_table import rewrite

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


if __name__ == "__main__":
    sys.exit(rewrite("recipes", table, __doc__))
