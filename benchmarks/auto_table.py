"""Rewrite the README's table of chosen and uniform plans from benchmarks/results/auto.json.

python benchmarks/auto_table.py            # rewrites the part between <!-- table:auto --> marks
python benchmarks/auto_table.py --check    # exit 1 when the README is stale
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from readme_table import rewrite

from thesean.report.markdown import provenance


def table(results: dict[str, Any]) -> str:
    """For each bound: all plans that meet it, best first; the loss is the mean over seeds, with its range."""
    budget, ms = results["budget"], results["ms"]
    guide = results["runs"][0]["guide"]
    about = (
        f"Prefill of {budget['context']} tokens, batch 1; the guide takes {ms['guide']:.1f} ms and is at "
        f"{guide:.3f} nats. Each plan was converted in {budget['steps']} steps of {budget['batch']} x "
        f"{budget['length']} characters."
    )
    lines = [
        about,
        "",
        "| bound | plan | ms | loss | seeds | parameters |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for speedup in sorted({s["speedup"] for s in results["searches"]}):
        lines += _rows(results, speedup)
    return "\n".join([*lines, "", provenance(results)])


def _rows(results: dict[str, Any], speedup: float) -> list[str]:
    ms = results["ms"]
    chosen = {f"auto, {speedup:g} times, seed {s['seed']}" for s in results["searches"] if s["speedup"] == speedup}
    bound = ms["guide"] / speedup
    limit = max(bound, *(ms[name] for name in chosen))
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        uniform = not run["name"].startswith("auto")
        if run["name"] in chosen or (uniform and ms[run["name"]] <= limit):
            found.setdefault(run["name"] if uniform else "**auto**", []).append(run)
    rows = []
    for name, runs in sorted(found.items(), key=lambda item: statistics.fmean(r["loss"] for r in item[1])):
        losses = [r["loss"] for r in runs]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        took = statistics.fmean(ms[r["name"]] for r in runs)
        params = statistics.fmean(r["params"] for r in runs)
        rows.append(
            f"| {bound:.1f} ms ({speedup:g}x) | {name} | {took:.1f} | {statistics.fmean(losses):.3f}{spread} | "
            f"{len(runs)} | {params / 1000:.0f} k |"
        )
    return rows


if __name__ == "__main__":
    sys.exit(rewrite("auto", table, __doc__))
